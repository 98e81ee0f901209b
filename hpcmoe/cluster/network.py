"""The links of a cluster, and what an exchange between ranks puts on each of them.

A message between ranks of a node crosses the sender's port and the receiver's (NVLink), or the node's shared memory.
One between nodes crosses the sender's way to its adapter, the adapter, the node's uplink, then for each level of
switches on which the two nodes are apart the uplink of the sender's switch and the downlink of the receiver's, and
the receiver's adapter and way. An exchange on its own takes

    host time of an exchange + host time per message * (messages of the busiest rank) + latency + max over links of bytes / bandwidth

(the max-link-load closed form; Alexandrov et al., LogGP, SPAA 1995, for the first two terms). Exchanges that overlap
share links: fair.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hpcmoe.cluster.clusterfile import ClusterFile
from hpcmoe.errors import UserError

INSIDE, NODES = -2, -1  # where a link counts: between ranks of a node, between nodes; i >= 0: between switches of level i
OUT, IN, BOTH = "out", "in", "both"


@dataclass(frozen=True)
class Kind:
    """Links of one kind. name: for tables; direction: "out" carries what its ranks send, "in" what they get, "both" either;
    reach: INSIDE, NODES or a level of switches; first: number of its first link; link_r: of each rank its link, counted
    from `first`; bandwidth: bytes/s of each."""

    name: str
    direction: str
    reach: int
    first: int
    link_r: np.ndarray
    bandwidth: float

    @property
    def count(self) -> int:
        return int(self.link_r.max()) + 1


class Exchange(NamedTuple):
    """One exchange. load_l: bytes on each link; host_s: of the rank with the most messages; latency_s: of the farthest message."""

    load_l: np.ndarray
    host_s: float
    latency_s: float


class Busiest(NamedTuple):
    """The link that an exchange waits for: its kind, its number within the kind, bytes on it, and s that they take."""

    kind: str
    number: int
    nbytes: float
    seconds: float


class Network:
    """The links of a cluster.

    kinds: Kind; bandwidth_l: bytes/s of every link; node_r: the node of each rank. Ranks are numbered along the
    nodes; `node_of_rank` says otherwise where a job's ranks lie differently (each node's ranks then take its ports and
    adapters in ascending order). in_host_memory: the same links for what lies in host memory (simulate/staged.py). Raises UserError where the cluster has no such nodes, or a node more ranks than the file says.
    """

    def __init__(self, c: ClusterFile, node_of_rank=None):
        self.cluster = c
        ranks = np.arange(c.ranks)
        self.node_r = ranks // c.nodes.ranks_per_node if node_of_rank is None else np.asarray(node_of_rank)
        ranks, most = np.arange(len(self.node_r)), np.bincount(self.node_r).max()
        if self.node_r.max() >= c.nodes.count or most > c.nodes.ranks_per_node:
            raise UserError(f"{c.name}: {self.node_r.max() + 1} nodes of up to {most} ranks: expected at most nodes.count = {c.nodes.count} "
                            f"of nodes.ranks_per_node = {c.nodes.ranks_per_node}")
        self.group_ir = [self.node_r // level.nodes for level in c.switch]
        self.kinds: list[Kind] = []
        if c.inside:
            rate = 1e9 * c.inside.efficiency
            self._pair("port", INSIDE, ranks, c.inside.rank_gb_per_s, rate)
            if c.inside.node_gb_per_s:
                self._add("shared memory", BOTH, INSIDE, self.node_r, c.inside.node_gb_per_s * rate)
        if c.nic:
            rate = 1e9 * c.nic.efficiency
            nic_r = self.node_r * c.nic.per_node + self._within() * c.nic.per_node // c.nodes.ranks_per_node
            self._pair("way to adapter", NODES, ranks, c.nic.rank_gb_per_s, rate)
            self._pair("adapter", NODES, nic_r, c.nic.bandwidth_gb_per_s, rate)
            self._pair("node", NODES, self.node_r, c.nic.node_gb_per_s, rate)
            for i, (group_r, uplink) in enumerate(zip(self.group_ir, c.uplinks())):
                if group_r.max() > 0:
                    self._pair(f"switch level {i}", i, group_r, uplink, 1.0)
        self.bandwidth_l = np.concatenate([np.full(k.count, k.bandwidth) for k in self.kinds] or [np.zeros(0)])
        self.in_host_memory = self

    def _within(self) -> np.ndarray:
        """The place of each rank among those of its node: [r]."""
        order = np.argsort(self.node_r, kind="stable")
        first_n = np.searchsorted(self.node_r[order], self.node_r)
        within_r = np.empty_like(order)
        within_r[order] = np.arange(len(order))
        return within_r - first_n

    def _pair(self, name: str, reach: int, link_r, bandwidth: float | None, rate: float) -> None:
        """Links out and in, unless there is no such limit."""
        if bandwidth:
            self._add(name + " out", OUT, reach, link_r, bandwidth * rate)
            self._add(name + " in", IN, reach, link_r, bandwidth * rate)

    def _add(self, name: str, direction: str, reach: int, link_r, bandwidth: float) -> None:
        first = self.kinds[-1].first + self.kinds[-1].count if self.kinds else 0
        self.kinds.append(Kind(name, direction, reach, first, link_r, bandwidth))

    # ------------------------------------------------------------ exchanges
    def matrix(self, ranks, bytes_rr) -> Exchange:
        """The exchange in which ranks[i] sends bytes_rr[i, j] to ranks[j]; what a rank sends to itself is on no link."""
        ranks, bytes_rr = np.asarray(ranks), np.array(bytes_rr, dtype=float)
        np.fill_diagonal(bytes_rr, 0)
        load_l = np.zeros(len(self.bandwidth_l))
        for kind in self.kinds:
            crossing_rr = np.where(self._crosses(kind.reach, ranks), bytes_rr, 0)
            into_r = crossing_rr.sum(axis=0 if kind.direction == IN else 1)
            self._book(load_l, kind, ranks, into_r)
        some_rr = bytes_rr > 0
        messages = (some_rr.sum(axis=0) + some_rr.sum(axis=1)).max(initial=0)
        reaches = [reach for reach in self._reaches() if (some_rr & self._crosses(reach, ranks)).any()]
        return Exchange(load_l, self._host_s(messages), self._latency_s(reaches, (bytes_rr * self._crosses(NODES, ranks)).max(initial=0)))

    def product(self, ranks, send_r, share_r) -> Exchange:
        """The exchange in which ranks[i] sends send_r[i] * share_r[j] bytes to ranks[j]; in time linear in the ranks.

        Exactly `matrix` of the outer product: uniform all-to-all, skewed experts (share_r), few leaders (send_r).
        """
        ranks, send_r, share_r = np.asarray(ranks), np.asarray(send_r, dtype=float), np.asarray(share_r, dtype=float)
        load_l = np.zeros(len(self.bandwidth_l))
        for kind in self.kinds:
            a_r, b_r = (share_r, send_r) if kind.direction == IN else (send_r, share_r)
            self._book(load_l, kind, ranks, a_r * self._partners(kind.reach, ranks, b_r))
        sends, gets = (send_r > 0).astype(float), (share_r > 0).astype(float)
        messages = (sends * (gets.sum() - gets) + gets * (sends.sum() - sends)).max(initial=0)
        reaches = [reach for reach in self._reaches() if (sends * self._partners(reach, ranks, gets)).any()]
        return Exchange(load_l, self._host_s(messages), self._latency_s(reaches, send_r.max(initial=0) * share_r.max(initial=0)))

    def pairs(self, sender_i, receiver_i, bytes_i) -> Exchange:
        """The exchange of messages i, each of bytes_i[i] > 0 from one rank to another (those between a rank and itself, or of no
        bytes, do not count); in time linear in the messages."""
        sender_i, receiver_i, bytes_i = np.asarray(sender_i), np.asarray(receiver_i), np.asarray(bytes_i, dtype=float)
        some_i = (bytes_i > 0) & (sender_i != receiver_i)
        sender_i, receiver_i, bytes_i = sender_i[some_i], receiver_i[some_i], bytes_i[some_i]
        load_l = np.zeros(len(self.bandwidth_l))
        crosses = {reach: self._apart(reach, sender_i, receiver_i) for reach in self._reaches()}
        for kind in self.kinds:
            ranks = receiver_i if kind.direction == IN else sender_i
            self._book(load_l, kind, ranks, bytes_i * crosses[kind.reach])
        reaches = [reach for reach, crosses_i in crosses.items() if crosses_i.any()]
        messages = np.bincount(np.concatenate([sender_i, receiver_i])).max(initial=0)
        return Exchange(load_l, self._host_s(messages), self._latency_s(reaches, bytes_i.max(initial=0)))

    def _apart(self, reach: int, sender_i, receiver_i) -> np.ndarray:
        """Which messages use links of this reach: bool [i]."""
        if reach == INSIDE:
            return self.node_r[sender_i] == self.node_r[receiver_i]
        group_r = self.node_r if reach == NODES else self.group_ir[reach]
        return group_r[sender_i] != group_r[receiver_i]

    def _crosses(self, reach: int, ranks) -> np.ndarray:
        """Which pairs' messages use links of this reach: bool [r, r]."""
        if reach == INSIDE:
            return self.node_r[ranks][:, None] == self.node_r[ranks]
        group_r = self.node_r[ranks] if reach == NODES else self.group_ir[reach][ranks]
        return group_r[:, None] != group_r

    def _partners(self, reach: int, ranks, value_r) -> np.ndarray:
        """Of each rank, the sum of value_r over the others that it reaches by links of this reach: [r]."""
        group_r = self.node_r[ranks] if reach in (INSIDE, NODES) else self.group_ir[reach][ranks]
        _, group_r = np.unique(group_r, return_inverse=True)
        sum_r = np.bincount(group_r, weights=value_r)[group_r]
        return sum_r - value_r if reach == INSIDE else np.sum(value_r) - sum_r

    def _book(self, load_l: np.ndarray, kind: Kind, ranks, bytes_r) -> None:
        load_l[kind.first:kind.first + kind.count] += np.bincount(kind.link_r[ranks], weights=bytes_r, minlength=kind.count)

    # ------------------------------------------------------------ times
    def _reaches(self) -> list[int]:
        return [INSIDE, NODES, *range(len(self.group_ir))]

    def _latency_s(self, reaches: list[int], largest: float) -> float:
        """Of the farthest message: between nodes, and what each level of switches that it passes adds; largest: bytes of a message, which may
        have to be announced."""
        c = self.cluster
        inside = c.inside.latency_us if INSIDE in reaches and c.inside else 0.0
        announced = c.nic.announce_us if c.nic and largest > 1024 * c.nic.announce_kib else 0.0
        outside = c.nic.latency_us + announced + sum(c.switch[i].latency_us for i in reaches if i >= 0) if NODES in reaches else 0.0
        return max(inside, outside) * 1e-6

    def _host_s(self, messages: float) -> float:
        mpi = self.cluster.mpi
        return (mpi.exchange_us + float(messages) * mpi.message_us) * 1e-6 if mpi else 0.0

    def busiest(self, load_l: np.ndarray) -> Busiest:
        """The link that takes longest for its bytes; Busiest("none", 0, 0, 0) where there is nothing to move."""
        if not len(load_l) or not load_l.any():
            return Busiest("none", 0, 0.0, 0.0)
        link = int(np.argmax(load_l / self.bandwidth_l))
        kind = next(k for k in reversed(self.kinds) if k.first <= link)
        return Busiest(kind.name, link - kind.first, float(load_l[link]), float(load_l[link] / self.bandwidth_l[link]))

    def seconds(self, exchange: Exchange) -> float:
        """s of the exchange with the network to itself."""
        return exchange.host_s + exchange.latency_s + self.busiest(exchange.load_l).seconds


def together(exchanges: list[Exchange]) -> Exchange:
    """Exchanges of different ranks that go in step, as one: of groups that are alike, all at once.

    Loads add up; host time and latency are those of the slowest. Where groups are alike this is exact: none ends first.
    """
    return Exchange(np.sum([e.load_l for e in exchanges], axis=0), max(e.host_s for e in exchanges), max(e.latency_s for e in exchanges))
