"""What a decode step needs at least: bytes and flop over rates, in closed form (Williams et al., CACM 52 (2009) 4).

Per layer a sequence waits for attention's weights and its cache, then for an expert's weights, then for rows out and back; none of it can
begin before the one before has ended. d: model width; f: of an expert; a: of attention; k experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

from hpcmoe.cluster.clusterfile import ClusterFile
from hpcmoe.cluster.kernels import Calibration
from hpcmoe.paper.steady import Case

FP32 = 4


class Rates(NamedTuple):
    """bytes/s of the memory, for the cache, of a rank's port in its node and of its way out of it; flop/s; item: bytes of a number."""

    memory: float
    cache: float
    port: float
    nic: float
    flop: float
    item: int

    @classmethod
    def of_data_sheet(cls, c: ClusterFile, memory_gb_per_s: float, item: int) -> "Rates":
        memory, port, nic = memory_gb_per_s * 1e9, c.inside.rank_gb_per_s or c.inside.node_gb_per_s, _nic(c)
        return cls(memory, memory, port * 1e9, nic * 1e9, c.rank.tflop_per_s * 1e12, item)

    @classmethod
    def reached(cls, c: ClusterFile, calibration: Calibration) -> "Rates":
        """Memory as products and attention reach it, links as messages do."""
        port, g = (c.inside.rank_gb_per_s or c.inside.node_gb_per_s) * c.inside.efficiency, calibration.gemm
        return cls(g.memory_gb_per_s * 1e9, calibration.attention.kv_gb_per_s * 1e9, port * 1e9, _nic(c) * c.nic.efficiency * 1e9,
                   g.units * g.unit_gflop_per_s * 1e9, g.item_bytes)


def _nic(c: ClusterFile) -> float:
    """GB/s of a rank's share of its node's adapters."""
    return c.nic.bandwidth_gb_per_s * c.nic.per_node / c.nodes.ranks_per_node


class Parts(NamedTuple):
    """s of one stage of one layer (attention, cache, expert, exchange, sums), of the head, and of handing a batch to the next stage."""

    attention: float
    cache: float
    expert: float
    exchange: float
    sums: float
    head: float
    hand_on: float

    @property
    def layer(self) -> float:
        return self.attention + self.cache + self.expert + self.exchange + self.sums


def parts(case: Case, rates: Rates, ranks_per_node: int) -> Parts:
    """Even load, all places lead."""
    m, x, r = case.model, case.layout, rates
    d, a, rows, item = m.d, m.attention, case.batch / x.ep, r.item
    wide = (2 * a.heads + 2 * a.kv_heads) * a.head_dim
    matrices = (2 + m.expert.gated) * d * m.expert.f

    def product(weights: float, rows: float) -> float:
        return max(item * weights / r.memory, 2 * rows * weights / r.flop) / x.tp

    cache = item * 2 * a.kv_heads * a.head_dim * case.keys * rows / x.tp / r.cache
    experts = m.router.experts / x.ep if not x.replicas else 1.0
    expert = experts * product(matrices, case.batch * m.router.top_k / x.ep / experts)
    places = min(x.ep, max(1, ranks_per_node // x.tp))  # on a node
    sent = rows * m.router.top_k * d * item / x.ep      # by a rank to each
    exchange = 2 * max(sent * (places - 1) / r.port, sent * (x.ep - places) / r.nic)
    sums = 2 * 2 * (x.tp - 1) / x.tp * rows * d * item / r.port
    hand_on = rows * d * item / x.tp / r.nic
    return Parts(product(d * wide, rows), cache, expert, exchange, sums, product(m.vocab * d, rows), hand_on)


def tpot_s(case: Case, p: Parts) -> float:
    """One sequence's way through all layers, whatever else is in flight."""
    return case.model.layers * p.layer + p.head + (case.layout.pp - 1) * p.hand_on


def weights_s(case: Case, p: Parts) -> float:
    """Attention, experts and head alone."""
    return case.model.layers * (p.attention + p.expert) + p.head
