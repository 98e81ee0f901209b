"""The router on the GPU: expert_tk, weight_tk and, for permute, the rows per (block of rows, expert).

Letters: t row, k choice, e expert, b block of rows.
"""

from __future__ import annotations

import numpy as np

from hpcmoe.config import RouterConfig
from hpcmoe.errors import UserError
from hpcmoe.kernels.loader import valid
from hpcmoe.model.router import gate

MOST_EXPERTS, MOST_K = 512, 16
FEWEST_ROWS, MOST_BLOCKS = 16, 128
WARPS = 16  # of a block at most; a warp takes one row at a time
# Each block of permute reads the whole histogram: 128 KiB of L2 take about a microsecond.
MOST_COUNTS = 32768
SOFTMAX_ALL, SOFTMAX_SELECTED, SIGMOID, SPARSEMIXER = range(4)  # as in router.cu


def rows_per_block(rows: int, experts: int) -> int:
    """Rows that share one histogram."""
    blocks = max(32, min(MOST_BLOCKS, MOST_COUNTS // experts))
    return max(FEWEST_ROWS, -(-rows // blocks))


def histogram_shape(rows: int, experts: int) -> tuple[int, int]:
    """The shape of the hist_be that router() writes and permute() reads for `rows` rows in the shape of its arrays."""
    return -(-rows // rows_per_block(rows, experts)), experts


def router(m, logit_te, expert_tk, weight_tk, hist_be, *, config: RouterConfig, bias_e=None, rows=None) -> None:
    """expert_tk int32 and weight_tk fp32 [t, k] of logit_te fp32 [t, e], as hpcmoe.model.router.gate; one launch.

    hist_be int32 [histogram_shape(t, e)]: rows per (block of rows, expert), all of it written. bias_e fp32:
    added for the choice. rows: int32 [1] on the device, the rows that there are; those beyond stay as they are.
    Equal choices: the lowest index first. Raises UserError beyond 512 experts or 16 choices.
    """
    most, experts = logit_te.shape
    k = config.top_k
    if experts > MOST_EXPERTS or k > MOST_K:
        raise UserError(f"the router on the GPU takes at most {MOST_EXPERTS} experts and {MOST_K} of them per token, "
                        f"the model has {experts} and {k}")
    if not most:
        return
    per_block = rows_per_block(most, experts)
    warps = min(WARPS, per_block)
    lanes = next(n for n in (2, 4, 8, 16) if experts <= 32 * n)
    grouped = config.groups > 1 and config.score != "sparsemixer"
    numbers = most, per_block, experts, k, _kind(config), config.groups, config.top_groups, config.renormalise
    m.launch("router.cu", f"router_{lanes}", (hist_be.shape[0],), (32 * warps,),
             (logit_te, bias_e, expert_tk, weight_tk, hist_be, rows, *map(np.int32, numbers),
              np.float32(config.scale), np.float32(2 * config.jitter)),
             shared=4 * experts * (1 + warps if grouped else 1))


def router_twin(logit_te, expert_tk, weight_tk, hist_be, *, config: RouterConfig, bias_e=None, rows=None) -> None:
    """What router() does, by gate() on the host."""
    most, experts = logit_te.shape
    n = valid(rows, most)
    with np.errstate(all="ignore"):
        expert_tk[:n], weight_tk[:n] = gate(logit_te[:n], config, bias_e)
    hist_be[:] = 0
    block_t = np.arange(n) // rows_per_block(most, experts)
    np.add.at(hist_be, (block_t[:, None], expert_tk[:n]), 1)


def _kind(config: RouterConfig) -> int:
    if config.score == "softmax":
        return SOFTMAX_ALL if config.over == "all" else SOFTMAX_SELECTED
    return SPARSEMIXER if config.score == "sparsemixer" else SIGMOID
