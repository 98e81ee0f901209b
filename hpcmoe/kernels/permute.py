"""Rows to their send slots on the GPU, sorted stably by expert; as they are or packed as fp8.

Letters: t row, k choice, s send slot, i received row, d width, w bytes of a packed row, e expert, b block of rows.
"""

from __future__ import annotations

import numpy as np

from hpcmoe.kernels.e4m3 import fp8_pack, fp8_unpack
from hpcmoe.kernels.loader import valid
from hpcmoe.kernels.router import MOST_EXPERTS, histogram_shape, rows_per_block
from hpcmoe.model.copies import Copies
from hpcmoe.model.dtypes import from_fp32, name_of
from hpcmoe.model.route import route

CHUNK, RANKERS = 1024, 8  # as in permute.cu
MOST_ROWS = 256  # of a block: their slots are in shared memory
FEWEST_WARPS, MOST_WARPS = 8, 32
UNPACK_THREADS = 256


def permute(m, x_td, expert_tk, hist_be, slot_tk, x_sd, n_send_e, *, fp8: bool = False, rows=None, turns=None) -> None:
    """slot_tk: the place of each (t, k) among all pairs sorted stably by expert; x_sd[slot_tk] = x_td; one launch.

    x_td T [t, d]; expert_tk int32 [t, k] and hist_be int32 as router() wrote them; slot_tk int32 [t, k];
    x_sd T [t * k, d], or with fp8 uint8 [t * k, fp8_width(d)] as fp8_pack packs; n_send_e int32 [e]:
    rows per expert, in any memory that the device sees. rows: int32 [1], the rows that there are; slots of
    those beyond, and places of x_sd that no row has, stay as they are. Without rows n_send_e becomes zero.
    turns: int32, Copies.turns of the layer: the pairs are sorted by the slots of copies, and n_send_e has the rows of each slot.
    """
    (most, d), k, experts, slots = x_td.shape, expert_tk.shape[1], hist_be.shape[1], len(n_send_e)
    if turns is None and slots != experts or turns is not None and len(turns) != experts + 1 + 3 * slots or slots > MOST_EXPERTS:
        raise ValueError(f"permute: {slots} slots for {experts} experts, with {'no' if turns is None else len(turns)} turns")
    if experts > MOST_EXPERTS or tuple(hist_be.shape) != histogram_shape(most, experts):
        raise ValueError(f"permute: hist_be is {tuple(hist_be.shape)} for {most} rows and {experts} experts")
    chunks = 1 if fp8 else -(-d // CHUNK)
    items = most * chunks
    # One block per multiprocessor, as large as its share of the work.
    blocks = max(1, min(items, max(m.sms, -(-most // MOST_ROWS))))
    each = -(-items // blocks)
    warps = max(FEWEST_WARPS, min(MOST_WARPS, each))
    span = min(most, (each - 1) // chunks + 2) if items else 0
    numbers = most, d, k, experts, hist_be.shape[0], rows_per_block(most, experts)
    m.launch("permute.cu", "permute_fp8" if fp8 else "permute", (blocks,), (32 * warps,),
             (x_td, expert_tk, hist_be, slot_tk, x_sd, n_send_e, rows, *map(np.int32, numbers), turns, np.int32(slots)),
             shared=4 * ((2 + RANKERS) * experts + 16 + (0 if turns is None else slots) + span * k))


def permute_twin(x_td, expert_tk, hist_be, slot_tk, x_sd, n_send_e, *, fp8: bool = False, rows=None, turns=None) -> None:
    """What permute() does, by route() on the host; of hist_be only the shape is needed."""
    n, experts = valid(rows, len(x_td)), hist_be.shape[1]
    plan = route(expert_tk[:n], experts)
    if turns is not None:
        plan, _ = Copies.of_turns(turns, experts).spread(expert_tk[:n], plan, 0)
    slot_tk[:n], n_send_e[:] = plan.slot_tk, plan.n_send_e
    x = x_td[plan.token_s]
    if fp8:
        fp8_pack(x, x_sd[:len(x)])
    else:
        x_sd[:len(x)] = x


def unpack_fp8(m, x_iw, out_id, *, rows=None) -> None:
    """out_id T [i, d]: the values of packed rows x_iw uint8 [i, fp8_width(d)]; one launch."""
    most, d = out_id.shape
    if not most or not d:
        return
    units = most * -(-d // 16)
    blocks = min(-(-units // UNPACK_THREADS), 8 * m.sms)
    m.launch("permute.cu", "unpack_fp8", (blocks,), (UNPACK_THREADS,), (x_iw, out_id, rows, np.int32(most), np.int32(d)))


def unpack_fp8_twin(x_iw, out_id, *, rows=None) -> None:
    """What unpack_fp8() does, on the host."""
    n = valid(rows, len(out_id))
    with np.errstate(over="ignore"):
        out_id[:n] = from_fp32(fp8_unpack(x_iw[:n], out_id.shape[1]), name_of(out_id.dtype))
