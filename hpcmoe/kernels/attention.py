"""Causal attention over the paged KV cache: single rows (decode) and prefill chunks.

Letters: p page of the cache, o offset in a page, h head (KV head in the cache), c head_dim, s slot of
a sequence (page_sp: its pages in order), t token row, b single row, w tile, T the 16-bit type.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcmoe.errors import UserError
from hpcmoe.kernels.loader import valid
from hpcmoe.model.attention import Segments, attend
from hpcmoe.model.dtypes import from_fp32, name_of, to_fp32

TILE = 64             # rows of a prefill tile at most
WIDTHS = {64: (4, 64), 128: (4, 64), 256: (2, 32)}  # columns in shared memory: decode's warps, prefill's keys
EXACT = 64, 128       # head_dims with kernels of their own
BLOCKS_PER_SM = 6     # of decode: two rounds of three
SHORTEST_SPLIT = 128  # positions


class Work(NamedTuple):
    """Which rows are there: int32 arrays.

    decode_b [D]: row numbers of single-row segments. n_decode [1]: how many of them count (None: all).
    tile_w4 [W, 4]: (first row, rows <= TILE, slot, position of the first row) of prefill tiles; n_tiles
    [1] or None likewise.
    """

    decode_b: np.ndarray
    n_decode: np.ndarray | None
    tile_w4: np.ndarray
    n_tiles: np.ndarray | None


def tiles_of(first_q, count_q, slot_q, start_q) -> np.ndarray:
    """tile_w4 (int32) of segments: rows first_q.. (count_q of them) of slot_q from position start_q on.

    The tiles that see most positions stand first, so that none of them begins last on the device.
    """
    first_q, count_q, slot_q, start_q = (np.asarray(a, np.int64) for a in (first_q, count_q, slot_q, start_q))
    tiles_q = -(-count_q // TILE)
    q = np.repeat(np.arange(len(count_q)), tiles_q)
    offset = (np.arange(len(q)) - np.repeat(np.cumsum(tiles_q) - tiles_q, tiles_q)) * TILE
    tile_w4 = np.stack([first_q[q] + offset, np.minimum(TILE, count_q[q] - offset), slot_q[q], start_q[q] + offset], 1)
    return tile_w4[np.argsort(-(tile_w4[:, 3] + tile_w4[:, 1]), kind="stable")].astype(np.int32)


def splits(m, decode_rows: int, kv_heads: int, longest: int) -> int:
    """Parts into which decode divides each row's positions, so that all multiprocessors have work.

    longest: positions of the longest row (with a window: the window at most).
    """
    wanted = -(-BLOCKS_PER_SM * m.sms // max(1, decode_rows * kv_heads))
    return max(1, min(wanted, longest // SHORTEST_SPLIT))


def workspace_floats(rows: int, heads: int, head_dim: int, splits: int) -> int:
    """Elements of the fp32 workspace of decode: per row, head and split a sum [head_dim], its scale and its weight."""
    return rows * heads * splits * (head_dim + 2) if splits > 1 else 0


def attention(m, q_thc, k_phoc, v_phoc, page_sp, slot_t, position_t, work: Work, out_thc, *, window: int = 0,
              splits: int = 1, workspace=None) -> None:
    """out_thc = softmax(q k^T) v for the rows of `work`; other rows of out_thc stay as they are.

    q_thc, out_thc T [R, heads, head_dim], q already scaled; k_phoc, v_phoc T [pages, kv_heads, page_tokens,
    head_dim]; page_sp int32 [slots, pages per sequence]; slot_t, position_t int32 [R]. Row t sees the
    positions <= position_t of its slot, the last `window` of them where window > 0; head h uses KV head
    h // (heads / kv_heads) (GQA, arXiv 2305.13245). Online softmax (flash attention, arXiv 2205.14135), fp32
    sums; the softmax's weights are rounded to T before they meet the values. splits > 1: workspace fp32
    [workspace_floats(len(decode_b), ...)]. At most 3 launches: decode, its combine, prefill. UserError: a
    head_dim or page_tokens that the kernels do not have. ValueError: no workspace, or a smaller one.
    """
    rows, heads, head_dim = q_thc.shape
    _, kv_heads, page_tokens, _ = k_phoc.shape
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise UserError(f"attention on the GPU: head_dim = {head_dim}: expected a multiple of 16, at most 256")
    if page_tokens % 16 or page_tokens < 16:
        raise UserError(f"attention on the GPU: page_tokens = {page_tokens}: expected a multiple of 16")
    most = len(work.decode_b)
    needed = workspace_floats(most, heads, head_dim, splits)
    if needed and (workspace is None or workspace.size < needed):
        raise ValueError(f"attention: {splits} splits of {most} rows without a workspace of {needed} floats")
    kernel = str(head_dim) if head_dim in EXACT else "any_128" if head_dim < 128 else "any_256"
    width = int(kernel.split("_")[-1])
    warps, keys = WIDTHS[width]
    i32 = np.int32
    shape = i32(heads), i32(kv_heads), i32(head_dim), i32(page_tokens), i32(page_sp.shape[1]), i32(window)
    if most:
        parts = -(-heads // kv_heads // 16)
        m.launch("attention_decode.cu", f"decode_{kernel}", (most, kv_heads * parts, splits), (warps * 32,),
                 (q_thc, k_phoc, v_phoc, page_sp, slot_t, position_t, work.decode_b, work.n_decode, i32(most), out_thc,
                  workspace, *shape, i32(splits)), shared=_decode_bytes(width, warps))
    if most and splits > 1:
        m.launch("attention_decode.cu", "combine", (most, heads), (min(128, -(-head_dim // 32) * 32),),
                 (workspace, position_t, work.decode_b, work.n_decode, i32(most), out_thc, i32(heads), i32(head_dim),
                  i32(window), i32(splits)))
    tiles = len(work.tile_w4)
    if tiles:
        m.launch("attention_prefill.cu", f"prefill_{kernel}", (tiles * heads,), (128,),
                 (q_thc, k_phoc, v_phoc, page_sp, work.tile_w4, work.n_tiles, i32(tiles), out_thc, *shape),
                 shared=_prefill_bytes(width, keys))


def _decode_bytes(width: int, warps: int) -> int:
    """Shared memory of a decode block: queries, two stages of keys and values per warp, base and sum of each row."""
    return 32 + (1 + 4 * warps) * 16 * (width + 8) * 2 + warps * 32 * 4


def _prefill_bytes(width: int, keys: int) -> int:
    """Shared memory of a prefill block: queries, keys and values, the scores of four warps, the scale of each row."""
    return 32 + (TILE + 2 * keys) * (width + 8) * 2 + TILE * (keys + 8) * 4 + TILE * 4


def attention_twin(q_thc, k_phoc, v_phoc, page_sp, slot_t, position_t, work: Work, out_thc, *, window: int = 0,
                   splits: int = 1, workspace=None) -> None:
    """attention on host arrays, all of it in fp32. splits and workspace change nothing."""
    page_tokens = k_phoc.shape[2]
    n_decode, n_tiles = (valid(n, len(a)) for a, n in ((work.decode_b, work.n_decode), (work.tile_w4, work.n_tiles)))
    segments = [(t, 1, slot_t[t], position_t[t]) for t in work.decode_b[:n_decode]] + list(work.tile_w4[:n_tiles])
    for first, count, slot, start in segments:
        rows = slice(first, first + count)
        page_p = page_sp[slot, :-(-(start + count) // page_tokens)]
        k_1hpc, v_1hpc = (to_fp32(a[page_p]).transpose(1, 0, 2, 3).reshape(1, a.shape[1], -1, a.shape[3])
                          for a in (k_phoc, v_phoc))
        if window:  # what no row sees may be anything
            k_1hpc[:, :, :max(0, start + 1 - window)] = v_1hpc[:, :, :max(0, start + 1 - window)] = 0
        one = Segments.of(np.array([0]), np.array([start]), np.array([count]))
        out_thc[rows] = from_fp32(attend(to_fp32(q_thc[rows]), one, k_1hpc, v_1hpc, window), name_of(out_thc.dtype))
