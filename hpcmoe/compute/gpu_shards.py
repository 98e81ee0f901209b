"""A leader's tensor shard on a GPU: its parts of sums, in 16 bits on their way, and the logits of all shards."""

from __future__ import annotations

import numpy as np

from hpcmoe.device import Gpu
from hpcmoe.kernels.embed import embed
from hpcmoe.kernels.loader import Kernels
from hpcmoe.kernels.shards import add_rows, narrow, place_columns, sum_parts
from hpcmoe.model.shard import Shard


class Sums:
    """Buffers of one lane: made_td fp32, what was made; part_td and total_td T, on its way; parts of all shards, their sum."""

    def __init__(self, gpu: Gpu, rows: int, d: int, t_dtype, shards: int):
        mine = -(-rows // shards)  # rows that this shard adds up, at most
        self.made_td = gpu.empty((rows, d), np.float32)
        self.part_td, self.total_td = gpu.empty((rows, d), t_dtype), gpu.empty((rows, d), t_dtype)
        self.parts, self.sum = gpu.empty((mine * shards, d), t_dtype), gpu.empty((mine, d), t_dtype)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in vars(self).values())


class Vocabulary:
    """On the first shard: room for other shards' logits and for those of all. rows: most at once; vocab: of the whole model."""

    def __init__(self, gpu: Gpu, rows: int, shard: Shard, vocab: int):
        self.first_j = [Shard.first(vocab, j, shard.count) for j in range(shard.count + 1)]
        self.rooms = [gpu.empty((rows, b - a), np.float32) for a, b in zip(self.first_j[1:], self.first_j[2:])]
        self.logit_nv = gpu.empty((rows, vocab), np.float32)

    @property
    def nbytes(self) -> int:
        return self.logit_nv.nbytes + sum(a.nbytes for a in self.rooms)


class GpuShard:
    """What a Leader does on tensor shards: m is a micro-batch, `what` the op whose result is summed."""

    def __init__(self, gpu: Gpu, kernels: Kernels, shard: Shard, rows: int, d: int, lanes: int):
        self.gpu, self.kernels, self.shard = gpu, kernels, shard
        self.lanes = [Sums(gpu, rows, d, kernels.t_dtype, shard.count) for _ in range(lanes)]
        self.vocabulary: list[Vocabulary] = []

    def open_head(self, rows: int, vocab: int) -> None:
        """Makes room for logits, on the last stage."""
        if self.shard.number == 0:
            self.vocabulary = [Vocabulary(self.gpu, rows, self.shard, vocab) for _ in self.lanes]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.lanes, *self.vocabulary))

    def of(self, m: int) -> Sums:
        return self.lanes[m % len(self.lanes)]

    # ------------------------------------------------------------ parts
    def embed(self, m: int, table_vd, token_t, x_td) -> None:
        """The embeddings that this shard has are its part; x_td starts at zero."""
        sums, n = self.of(m), len(token_t)
        self.gpu.zero(x_td)
        embed(self.kernels, table_vd, token_t, sums.made_td[:n], first_id=self.shard.vocab.start)
        self.close(m, n)

    def empty(self, m: int, rows: int):
        """Zeros that merge adds to: fp32 [t, d]."""
        made_td = self.of(m).made_td[:rows]
        self.gpu.zero(made_td)
        return made_td

    def close(self, m: int, rows: int) -> None:
        """What was made becomes the part that travels."""
        sums = self.of(m)
        narrow(self.kernels, sums.made_td[:rows], sums.part_td[:rows])

    def sum_parts(self, m: int, parts, rows: int):
        total_td = self.of(m).sum[:rows]
        sum_parts(self.kernels, parts.reshape(self.shard.count, rows, parts.shape[1]), total_td)
        return total_td

    def add_total(self, m: int, x_td) -> None:
        add_rows(self.kernels, self.of(m).total_td[:len(x_td)], x_td)

    # ------------------------------------------------------------ logits
    def room(self, m: int, shard: int, rows: int):
        return self.vocabulary[m % len(self.lanes)].rooms[shard - 1][:rows]

    def whole(self, m: int, blocks: list):
        """The logits of all shards side by side: [n, v]."""
        v = self.vocabulary[m % len(self.lanes)]
        for block, first in zip(blocks, v.first_j):
            place_columns(self.kernels, block, v.logit_nv, first)
        return v.logit_nv[:len(blocks[0])]
