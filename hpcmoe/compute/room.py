"""How many sequences, or pages of the KV cache, fit in memory."""

from __future__ import annotations

from hpcmoe.compute.base import Sizes
from hpcmoe.config import ModelConfig, RunJob
from hpcmoe.errors import UserError
from hpcmoe.model.kvcache import bytes_per_sequence

KV_SHARE = 0.9  # of a node's free memory


def fit_slots(model: ModelConfig, layers: int, wanted: Sizes, run: RunJob, free: int, leaders: int, where: str) -> int:
    """Slots per micro-batch whose KV cache fits `free` bytes on this leader, at most the wanted ones.

    Raises UserError, saying how many sequences fit, where run.max_sequences asks for more or none fits.
    """
    a = model.attention
    if not a.kv_heads:  # a tensor shard without heads
        return wanted.slots
    one = bytes_per_sequence(layers, a.kv_heads, a.head_dim, wanted.context)
    free = int(run.memory_gb * 2**30) if run.memory_gb else int(free * KV_SHARE)
    fitting = free // (one * wanted.micros)
    if fitting >= wanted.slots:
        return wanted.slots
    if run.max_sequences or fitting < 1:
        raise UserError(
            f"job: KV cache: {wanted.slots * wanted.micros} sequences of {wanted.context} tokens need "
            f"{one * wanted.slots * wanted.micros / 2**30:.3g} GiB on {where}, {free / 2**30:.3g} GiB are free: "
            f"{free // one * leaders} sequences fit in a replica: lower run.max_sequences = {run.max_sequences} "
            f"or run.context = {run.context}, or raise run.memory_gb")
    return fitting


def fit_pages(model: ModelConfig, layers: int, wanted: Sizes, run: RunJob, free: int, leaders: int, where: str) -> Sizes:
    """`wanted` with as many pages of the KV cache (16-bit keys and values) as fit `free` bytes, or as can be of use.

    layers: that this rank leads, 0 for none. Raises UserError, saying what would fit, where the longest
    request does not.
    """
    a, tokens = model.attention, run.page_tokens
    each = -(-wanted.context // tokens)  # pages of the longest sequence
    pages = wanted.slots * wanted.micros * each
    if layers:
        page = 2 * layers * a.kv_heads * a.head_dim * tokens * 2
        free = int(run.memory_gb * 2**30) if run.memory_gb else free
        pages = min(pages, free // page)
        if pages < each:
            raise UserError(
                f"job: KV cache: one sequence of {wanted.context} tokens needs {each * page / 2**30:.3g} GiB on {where}, "
                f"{free / 2**30:.3g} GiB are left after weights and buffers: {pages * tokens} tokens fit: lower run.context = "
                f"{run.context} or run.batch_tokens = {run.batch_tokens}, raise run.gpu_memory_fraction, or use more stages")
    return wanted._replace(pages=int(pages), page_tokens=tokens)
