"""What the ranks of a candidate hold, by the simulator's own numbers (simulate/memory.py), for thousands of them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from hpcmoe.compute.base import Sizes
from hpcmoe.compute.room import KV_SHARE
from hpcmoe.model.kvcache import bytes_per_sequence
from hpcmoe.parallel.layout import Layout
from hpcmoe.parallel.schedule import Role
from hpcmoe.plan.candidates import Candidate
from hpcmoe.simulate.memory import buffers, held_weights, shard_of
from hpcmoe.simulate.run import Told


class Needs(NamedTuple):
    """Bytes on the rank that lacks most (or has least left): of weights, of buffers, of the KV cache; over: beyond what it may use."""

    weights: int
    buffers: int
    kv: int
    over: float


class Room:
    """usable: bytes of a rank that a job may use."""

    def __init__(self, told: Told):
        self.told, self.item = told, told.calibration.gemm.item_bytes
        memory, run = told.cluster.rank.memory_gib * 2**30, told.job.run
        self.usable = int(memory * (run.gpu_memory_fraction if told.gpu else 1))
        self.context = run.context or sum(told.lengths[0])
        self.weights = lru_cache(maxsize=None)(self._weights)
        self.local = lru_cache(maxsize=None)(lambda tp: shard_of(told.model, tp).model)

    def _weights(self, layout: Layout) -> list[tuple[Role, int, int]]:
        """(role, bytes, layers) of the roles that differ: of stages with equally many layers, the first, one in the middle and the last."""
        found, seen = [], set()
        for stage in range(layout.pp):
            layers = len(layout.layers_of(stage, self.told.model.layers))
            kind = (layers, stage == 0, stage == layout.pp - 1)
            if kind not in seen:
                seen.add(kind)
                found += [(role, held_weights(self.told.model, layout, role, self.item, self.told.gpu), layers)
                          for role in (Role(stage, True), Role(stage, False))]
        return found

    def needs(self, c: Candidate) -> Needs:
        """Of the fullest rank."""
        shape, run, gpu = c.shape, self.told.job.run, self.told.gpu
        layout, local = shape.layout, self.local(shape.layout.tp)
        each = -(-self.context // run.page_tokens)
        chosen = min(self.told.model.router.top_k, -(-layout.slots(self.told.model.router.experts) // layout.ep))
        sizes = Sizes(c.micros, c.lanes, shape.sequences, shape.rows, self.context, 0, 0, shape.rows * shape.leaders * chosen)
        found = []
        for role, weights, layers in self.weights(replace(layout, dp=1)):
            taken, kv = buffers(local, sizes, role, role.stage == layout.pp - 1, self.item, gpu), 0
            limit = self.usable - weights - taken
            if role.leader:
                a, most = local.attention, shape.sequences * c.micros
                kv = most * (4 * layers * a.kv_heads * a.head_dim * run.page_tokens * each if gpu else
                             bytes_per_sequence(layers, a.kv_heads, a.head_dim, self.context))
                if limit > 0:
                    limit = run.memory_gb * 2**30 if run.memory_gb else limit * (1 if gpu else KV_SHARE)
            found.append(Needs(weights, taken, kv, kv - limit))
        return max(found, key=lambda n: n.over)
