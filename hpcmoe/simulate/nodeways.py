"""A hierarchical exchange on the links (parallel/hierarchical.py): a row crosses to a node once, to a forwarder that hands it on there.

Two hops out, two back. What forwarders do between the hops (rows gathered, sums made) is a pass over them that delays the second hop.
"""

from __future__ import annotations

from functools import lru_cache
from math import comb
from typing import Callable

import numpy as np

from hpcmoe.parallel.nodes import Nodes
from hpcmoe.simulate.ways import FLAGS, INT32, Moved, Ways

DRAWN = 1 << 14  # tokens from which the visits of uneven experts are counted


def visits(share_e: np.ndarray, top_k: int, node_e: np.ndarray, nodes: int) -> np.ndarray:
    """How often a token needs each node [n]; node_e: where each slot is.

    For even shares 1 - C(E - E_n, k) / C(E, k). Uneven ones: counted over tokens that draw one slot after the other in proportion
    to the shares of those left (as cluster/balance_run.py), with a fixed seed.
    """
    slots = len(share_e)
    if np.ptp(share_e) < 1e-12:
        return np.array([1 - comb(slots - int(n), top_k) / comb(slots, top_k) for n in np.bincount(node_e, minlength=nodes)])
    chosen_tk = _drawn(np.asarray(share_e, dtype=float).tobytes(), top_k)
    needs_tn = np.zeros((DRAWN, nodes), dtype=bool)
    needs_tn[np.arange(DRAWN)[:, None], node_e[chosen_tk]] = True
    return needs_tn.mean(axis=0)


@lru_cache(maxsize=64)
def _drawn(share_e: bytes, top_k: int) -> np.ndarray:
    """The slots that tokens draw [t, k]."""
    log_e = np.log(np.maximum(np.frombuffer(share_e), 1e-300))
    return np.argpartition(-(log_e + np.random.default_rng(0).gumbel(size=(DRAWN, len(log_e)))), top_k - 1, axis=1)[:, :top_k]


class NodeWays:
    """The hierarchical exchanges of the replicas of `ways`. pass_s: seconds of a pass over so many bytes on a forwarder;
    share_ls: of each layer's rows the share of each slot; owner_s: the place of each slot."""

    def __init__(self, ways: Ways, share_ls: np.ndarray, owner_s: list[int], top_k: int, pass_s: Callable[[float], float]):
        self.ways, self.share_ls, self.top_k, self.pass_s = ways, share_ls, top_k, pass_s
        self.owner_s = np.array(owner_s)
        self.made: dict[tuple, tuple[Moved, ...]] = {}
        self.visit_ln: dict[tuple[int, int], np.ndarray] = {}

    def _nodes(self, stage: int) -> Nodes:
        return Nodes(self.ways.network.node_r[self.ways.columns(stage)[0]].tolist(), 0)

    def _visits(self, stage: int, layer: int) -> np.ndarray:
        if (stage, layer) not in self.visit_ln:
            nodes = self._nodes(stage)
            self.visit_ln[stage, layer] = visits(self.share_ls[layer], self.top_k, nodes.number_r[self.owner_s], len(nodes.members))
        return self.visit_ln[stage, layer]

    # ------------------------------------------------------------ hops
    def _between(self, stage: int, nodes: Nodes, rows_rn: dict[tuple[int, int], float], row_bytes: float, back: bool, delay_s: float) -> Moved:
        """From leader r to its forwarder on node n so many rows, by (r, n); back: the other way."""
        network, ep = self.ways.network, self.ways.layout.ep
        leader, other, rows = (np.array(x) for x in zip(*[(r, nodes.forwarder(r, n), rows) for (r, n), rows in rows_rn.items()])) if rows_rn \
            else (np.zeros(0, int),) * 3
        source, target = (other, leader) if back else (leader, other)
        exchanges = []
        for column in self.ways.columns(stage):
            ranks = np.array(column)
            exchanges.append(network.pairs(ranks[source], ranks[target], rows * row_bytes))
        (leg, host_s), none = self.ways.joined(exchanges, delay_s), np.zeros(ep)
        sent_r = np.bincount(source, weights=rows, minlength=ep)
        return Moved((leg,), host_s, none, none, sent_r, row_bytes)

    def _within(self, stage: int, nodes: Nodes, hand_r: np.ndarray, share_s: np.ndarray, row_bytes: float, back: bool, delay_s: float) -> Moved:
        """Each place hands hand_r tokens' rows to the places of its node by their shares; back: gets them."""
        a_r, b_r = (share_s, hand_r) if back else (hand_r, share_s)
        network, exchanges, own_r, sent_r = self.ways.network, [], a_r * b_r, np.zeros(len(a_r))
        for column in self.ways.columns(stage):
            ranks = np.array(column)
            exchanges += [network.product(ranks[mates], a_r[mates] * row_bytes, b_r[mates]) for mates in nodes.members]
        for mates in nodes.members:
            sent_r[mates] = a_r[mates] * b_r[mates].sum()
        leg, host_s = self.ways.joined(exchanges, delay_s)
        return Moved((leg,), host_s, own_r, sent_r - own_r, np.zeros(len(a_r)), row_bytes)

    # ------------------------------------------------------------ ops
    def counts(self, stage: int) -> tuple[Moved, ...]:
        """Leaders to forwarders, then every place to the others of its node."""
        def make() -> tuple[Moved, ...]:
            nodes, ones = self._nodes(stage), np.ones(self.ways.layout.ep)
            slots_n = np.bincount(nodes.number_r[self.owner_s], minlength=len(nodes.members))
            pairs = {(r, n): 1.0 for r in self.ways.leaders_p[stage] for n in range(len(nodes.members)) if n != nodes.number_r[r]}
            most = float(1 + FLAGS + slots_n.max())
            mates = self.ways.most_experts + FLAGS + max(map(len, nodes.members))
            within = self._within(stage, nodes, ones, ones, INT32 * mates, False, 0.0)
            return self._between(stage, nodes, pairs, INT32 * most, False, 0.0), within._replace(own_r=0 * ones)
        return self._once(("COUNTS", stage), make)

    def rows(self, stage: int, layer: int, rows_r: tuple[int, ...], rows_s: tuple[int, ...], row_bytes: float, back: bool) -> tuple[Moved, ...]:
        """Dispatch: parcels to forwarders (a row, and an expert and a weight for each choice), then rows to mates. Back: combine, rows to
        forwarders, then sums to leaders. rows_r: tokens of each place; rows_s: rows that each place gets."""
        visit_n = self._visits(stage, layer)

        def make() -> tuple[Moved, ...]:
            nodes, tokens = self._nodes(stage), sum(rows_r)
            parcels = {(r, n): rows * float(visit_n[n]) for r, rows in enumerate(rows_r) if rows
                       for n in range(len(nodes.members)) if n != nodes.number_r[r] and visit_n[n] > 0}
            hand_r = np.array(rows_r, dtype=float)
            for r, n in parcels:
                hand_r[nodes.forwarder(r, n)] += rows_r[r]
            share_s = np.array(rows_s, dtype=float) / tokens if tokens else np.zeros(len(rows_s))
            here_r = np.array([share_s[nodes.members[n]].sum() for n in nodes.number_r])
            busiest = float((hand_r * here_r).max())  # rows that a place handles between the hops
            delay_s = self.pass_s(2 * busiest * row_bytes) if parcels else 0.0
            if back:
                return (self._within(stage, nodes, hand_r, share_s, row_bytes, True, delay_s),
                        self._between(stage, nodes, parcels, row_bytes, True, 0.0))
            return (self._between(stage, nodes, parcels, row_bytes + 2 * INT32 * self.top_k, False, delay_s),
                    self._within(stage, nodes, hand_r, share_s, row_bytes, False, 0.0))
        return self._once((stage, visit_n.tobytes(), rows_r, rows_s, row_bytes, back), make)  # layers may be alike

    def _once(self, key: tuple, make) -> tuple[Moved, ...]:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]
