"""Links for the transport `staged`: what a GPU sends goes through pinned host memory on both sides (parallel/exchange.py).

Each rank copies, on one stream, what it sends to the host and what it gets to the device, a piece at a time; pieces travel while others are
copied. So copies are one more link, of a rank for itself: its load are the seconds that they take. What cannot overlap comes on top: the first piece
on its way down, the last one on its way up, and once more the wait for an event. Within a node messages pass through host memory, not over NVLink.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hpcmoe.cluster.clusterfile import ClusterFile
from hpcmoe.cluster.kernels import Calibration
from hpcmoe.cluster.network import Busiest, Exchange, Network
from hpcmoe.errors import UserError
from hpcmoe.parallel.plan import STAGED_BYTES


def network_of(c: ClusterFile, node_of_rank, calibration: Calibration, transport: str) -> Network:
    """The links as messages of this transport use them. Raises UserError as StagedNetwork."""
    return StagedNetwork(c, node_of_rank, calibration) if transport == "staged" else Network(c, node_of_rank)


class StagedNetwork(Network):
    """As Network; the last links are the ranks' copies. in_host_memory: for what lies there anyhow. Raises UserError where cluster or
    calibration do not say what it takes."""

    def __init__(self, c: ClusterFile, node_of_rank, calibration: Calibration):
        copies, inside = calibration.copies, c.inside
        if copies is None:
            raise UserError(f"run.transport = 'staged': copies is missing in the calibration of {calibration.machine!r}: what copies to and from the host take")
        if c.nodes.ranks_per_node > 1 and inside.host_rank_gb_per_s is None:
            raise UserError(f"run.transport = 'staged': inside.host_rank_gb_per_s is missing in the cluster {c.name!r}: messages through host memory")
        through_host = replace(c, inside=replace(inside, rank_gb_per_s=inside.host_rank_gb_per_s, efficiency=1.0))
        super().__init__(through_host, node_of_rank)
        self.first = len(self.bandwidth_l)
        self.out, self.into = copies.to_host_gb_per_s * 1e9, copies.to_device_gb_per_s * 1e9
        self.copy_s, self.wait_s, self.launch_s = copies.floor_us * 1e-6, calibration.sync_s, calibration.launch_s
        self.bandwidth_l = np.concatenate([self.bandwidth_l, np.full(len(self.node_r), self.out)])
        self.in_host_memory = Network(through_host, node_of_rank)
        self.in_host_memory.bandwidth_l = self.bandwidth_l  # the same links, by the same numbers

    def matrix(self, ranks, bytes_rr) -> Exchange:
        bytes_rr = np.array(bytes_rr, dtype=float)
        np.fill_diagonal(bytes_rr, 0)
        some_rr = bytes_rr > 0
        return self._copied(super().matrix(ranks, bytes_rr), ranks, bytes_rr.sum(axis=1), bytes_rr.sum(axis=0), some_rr.sum(axis=1), some_rr.sum(axis=0),
                            bytes_rr.max(initial=0.0))

    def product(self, ranks, send_r, share_r) -> Exchange:
        send_r, share_r = np.asarray(send_r, dtype=float), np.asarray(share_r, dtype=float)
        sends, gets = (send_r > 0).astype(float), (share_r > 0).astype(float)
        return self._copied(super().product(ranks, send_r, share_r), ranks, send_r * (share_r.sum() - share_r), share_r * (send_r.sum() - send_r),
                            sends * (gets.sum() - gets), gets * (sends.sum() - sends), send_r.max(initial=0.0) * share_r.max(initial=0.0))

    def pairs(self, sender_i, receiver_i, bytes_i) -> Exchange:
        sender_i, receiver_i, bytes_i = np.asarray(sender_i), np.asarray(receiver_i), np.asarray(bytes_i, dtype=float)
        some_i = (bytes_i > 0) & (sender_i != receiver_i)
        size = len(self.node_r)
        out, into = (np.bincount(rank_i[some_i], weights=bytes_i[some_i], minlength=size) for rank_i in (sender_i, receiver_i))
        sent, got = (np.bincount(rank_i[some_i], minlength=size) for rank_i in (sender_i, receiver_i))
        return self._copied(super().pairs(sender_i, receiver_i, bytes_i), np.arange(size), out, into, sent, got, bytes_i[some_i].max(initial=0.0))

    def _copied(self, exchange: Exchange, ranks, out_r, into_r, sent_r, got_r, largest: float) -> Exchange:
        """With the copies of ranks[i], which sends out_r[i] bytes in sent_r[i] messages and gets into_r[i] in got_r[i]; largest: message."""
        if not largest:
            return exchange
        down_r, up_r = np.maximum(sent_r, out_r / STAGED_BYTES), np.maximum(got_r, into_r / STAGED_BYTES)  # pieces
        seconds_r = (down_r + up_r) * self.copy_s + out_r / self.out + into_r / self.into
        exchange.load_l[self.first + np.asarray(ranks)] += seconds_r * self.out
        piece = min(largest, STAGED_BYTES)
        delay_s = 2 * self.copy_s + piece / self.out + piece / self.into + self.wait_s
        return exchange._replace(host_s=exchange.host_s + float((down_r + up_r).max()) * self.launch_s, latency_s=exchange.latency_s + delay_s)

    def busiest(self, load_l: np.ndarray) -> Busiest:
        link = int(np.argmax(load_l / self.bandwidth_l))
        if link < self.first or not load_l.any():
            return super().busiest(load_l)
        return Busiest("copies through the host", link - self.first, float(load_l[link]), float(load_l[link] / self.bandwidth_l[link]))
