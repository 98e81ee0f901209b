"""The paged cache of keys and values in a GPU's memory."""

from __future__ import annotations

import numpy as np

from hpcmoe.compute.base import Sizes
from hpcmoe.compute.step import Batch
from hpcmoe.config import ModelConfig
from hpcmoe.device import Gpu


class Cache:
    """k and v by layer, [page, kv head, token of the page, head_dim]; page_sp: the pages of each slot's sequence."""

    def __init__(self, gpu: Gpu, model: ModelConfig, sizes: Sizes, layers: list[int], t):
        a = model.attention
        shape = (sizes.pages, a.kv_heads, sizes.page_tokens, a.head_dim)
        self.gpu, self.page_tokens, self.slots = gpu, sizes.page_tokens, sizes.slots
        self.k = {layer: gpu.empty(shape, t) for layer in layers}
        self.v = {layer: gpu.empty(shape, t) for layer in layers}
        table = (sizes.slots * sizes.micros, -(-sizes.context // sizes.page_tokens))
        self.page_host, self.page_sp = gpu.pinned(table, np.int32), gpu.empty(table, np.int32)
        self.page_host[:] = 0

    @property
    def nbytes(self) -> int:
        return 2 * sum(a.nbytes for a in self.k.values())

    def admit(self, m: int, batch: Batch) -> None:
        """Queues the pages of the sequences that begin in a step of micro-batch m."""
        if not len(batch.page_n):
            return
        first_q = np.cumsum(batch.n_page_q) - batch.n_page_q
        for q in np.flatnonzero(batch.n_page_q):
            first, n = first_q[q], batch.n_page_q[q]
            self.page_host[batch.segments.slot_q[q], :n] = batch.page_n[first:first + n]
        own = slice(m * self.slots, (m + 1) * self.slots)  # other micro-batches may be reading theirs
        self.gpu.copy(self.page_sp[own], self.page_host[own])
