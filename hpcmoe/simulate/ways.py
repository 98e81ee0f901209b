"""What each exchange of a stage puts on the links, and how many rows each rank sends in it.

Of replicas that are alike all members' exchanges are one, with their loads added; rows and messages are those of a member.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcmoe.cluster import traffic
from hpcmoe.cluster.network import Exchange, Network, together
from hpcmoe.parallel.layout import Layout
from hpcmoe.simulate.clock import Leg

FLAGS = 4  # numbers that leaders tell beside the counts (parallel/flat.py)
INT32, FP32 = 4, 4


class Moved(NamedTuple):
    """One exchange. host_s: of posting, on the rank with the most messages; own_r, intra_r, inter_r: rows that each place sends to
    itself, within its node, to others; row_bytes: of each."""

    legs: tuple[Leg, ...]
    host_s: float
    own_r: np.ndarray
    intra_r: np.ndarray
    inter_r: np.ndarray
    row_bytes: float


class Ways:
    """The exchanges of the replicas `members`, which are alike. leaders_p: the places that lead, by stage."""

    def __init__(self, network: Network, layout: Layout, members: list[int], leaders_p: list[list[int]], slots: int):
        self.network, self.layout, self.members, self.leaders_p = network, layout, members, leaders_p
        self.most_experts = max(1, -(-slots // layout.ep))
        self.made: dict[tuple, Moved] = {}

    def _once(self, key: tuple, make) -> Moved:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def columns(self, stage: int) -> list[range]:
        """The ranks of a stage in all members and tensor shards; each column exchanges rows for itself."""
        return [self.layout.column(dp, stage, shard) for dp in self.members for shard in range(self.layout.tp)]

    def joined(self, exchanges: list[Exchange], delay_s: float = 0.0) -> tuple[Leg, float]:
        """(one leg, host seconds) of exchanges that go in step: equally many of each member, one member's after the other's. A member's count as
        one; those of all members share links for as many as there are: the leg's size is that of a member on its busiest link."""
        whole, member = together(exchanges), together(exchanges[:len(exchanges) // len(self.members)])
        if not whole.load_l.any():
            return Leg(None, whole.latency_s + delay_s), whole.host_s
        busiest, own = (float(x.load_l[np.argmax(x.load_l / self.network.bandwidth_l)]) for x in (whole, member))
        return Leg(whole.load_l, whole.latency_s + delay_s, busiest / own), whole.host_s

    # ------------------------------------------------------------ between places
    def _product(self, stage: int, send_r: np.ndarray, share_s: np.ndarray, row_bytes: float, back: bool = False, host: bool = False) -> Moved:
        """Place r sends send_r[r] * share_s[s] rows to place s; back: gets them; host: they lie in host memory."""
        network = self.network.in_host_memory if host else self.network
        a_r, b_r = (share_s, send_r) if back else (send_r, share_s)
        leg, host_s = self.joined([network.product(ranks, a_r * row_bytes, b_r) for ranks in self.columns(stage)])
        node_r = self.network.node_r[self.columns(stage)[0]]
        _, node_r = np.unique(node_r, return_inverse=True)
        own_r = a_r * b_r
        here_r = a_r * np.bincount(node_r, weights=b_r)[node_r]
        return Moved((leg,), host_s, own_r, here_r - own_r, a_r * b_r.sum() - here_r, row_bytes)

    def counts(self, stage: int) -> Moved:
        """Every place tells every other one."""
        ones = np.ones(self.layout.ep)

        def make() -> Moved:
            moved = self._product(stage, ones, ones, INT32 * (self.most_experts + FLAGS), host=True)
            return moved._replace(own_r=0 * ones)
        return self._once(("COUNTS", stage), make)

    def rows(self, stage: int, rows_r: tuple[int, ...], rows_s: tuple[int, ...], row_bytes: float, back: bool) -> Moved:
        """Dispatch, or back: combine, of rows_r tokens on each place, of whose choices place s gets rows_s."""
        def make() -> Moved:
            tokens = sum(rows_r)
            share_s = np.array(rows_s, dtype=float) / tokens if tokens else np.zeros(len(rows_s))
            return self._product(stage, np.array(rows_r, dtype=float), share_s, row_bytes, back)
        return self._once(("ROWS", stage, rows_r, rows_s, row_bytes, back), make)

    def stay(self, rows: int, row_bytes: float) -> Moved:
        """The only place of a stage keeps its rows."""
        none = np.zeros(1)
        return self._once(("STAY", rows, row_bytes), lambda: Moved((), 0.0, np.array([float(rows)]), none, none, row_bytes))

    # ------------------------------------------------------------ from leader to leader
    def hand_on(self, source: int, target: int, bytes_j: tuple[float, ...], rows_j: tuple[int, ...], host: bool = False) -> Moved:
        """Leader j (all of its shards) sends bytes_j[j] bytes to leader j of another stage; host: from host memory to host memory."""
        network = self.network.in_host_memory if host else self.network

        def make() -> Moved:
            pairs = []
            for dp in self.members:
                for shard in range(self.layout.tp):
                    a, b = (np.array(self.layout.column(dp, stage, shard))[self.leaders_p[stage]] for stage in (source, target))
                    pairs.append((a, b))
            leg, host_s = self.joined([network.pairs(a, b, bytes_j) for a, b in pairs])
            a, b = pairs[0]
            away_j, rows = self.network.node_r[a] != self.network.node_r[b], np.array(rows_j, dtype=float)
            place = np.zeros((3, self.layout.ep))
            place[1, self.leaders_p[source]], place[2, self.leaders_p[source]] = rows * ~away_j, rows * away_j
            return Moved((leg,), host_s, *place, sum(bytes_j) / max(1, sum(rows_j)))
        return self._once(("PAIRS", source, target, bytes_j, rows_j, host), make)

    # ------------------------------------------------------------ tensor shards
    def sums(self, stage: int, rows_j: tuple[int, ...], row_bytes: float) -> Moved:
        """Each leader's shards sum its rows: reduce-scatter, then all-gather."""
        def make() -> Moved:
            legs, host_s = [], 0.0
            for way in (0, 1):
                exchanges = [self.network.matrix(self._shards(dp, stage, place), traffic.sum_rows(rows, self.layout.tp)[way] * row_bytes)
                             for dp in self.members for place, rows in zip(self.leaders_p[stage], rows_j)]
                leg, posting_s = self.joined(exchanges)
                legs, host_s = legs + [leg], host_s + posting_s
            place = np.zeros((3, self.layout.ep))
            ranks = self._shards(self.members[0], stage, 0)
            near = float(np.mean([self.network.node_r[ranks] == node for node in self.network.node_r[ranks]])) * self.layout.tp - 1
            sent = np.array(rows_j) * 2 / self.layout.tp  # of a shard to each other one, both ways
            place[0, self.leaders_p[stage]] = sent
            place[1, self.leaders_p[stage]], place[2, self.leaders_p[stage]] = sent * near, sent * (self.layout.tp - 1 - near)
            return Moved(tuple(legs), host_s, *place, row_bytes)
        return self._once(("SUMS", stage, rows_j, row_bytes), make)

    def _shards(self, dp: int, stage: int, place: int) -> np.ndarray:
        return np.array([self.layout.column(dp, stage, shard)[place] for shard in range(self.layout.tp)])

    def gather(self, stage: int, bytes_j: tuple[float, ...]) -> Moved:
        """The shards of each leader give bytes_j[j] each to the first one: logits."""
        def make() -> Moved:
            exchanges = []
            for dp in self.members:
                for place, nbytes in zip(self.leaders_p[stage], bytes_j):
                    first, *others = self._shards(dp, stage, place)
                    exchanges.append(self.network.pairs(np.array(others), np.full(len(others), first), np.full(len(others), nbytes)))
            (leg, host_s), none = self.joined(exchanges), np.zeros(self.layout.ep)
            return Moved((leg,), host_s, none, none, none, 0.0)
        return self._once(("GATHER", stage, bytes_j), make)
