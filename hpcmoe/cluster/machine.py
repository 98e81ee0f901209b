"""A machine as data: which rank is on which node, what links carry, what a rank computes and holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpcmoe.cluster.clusterfile import ClusterFile, read_cluster


@dataclass(frozen=True)
class Machine:
    """What a placement needs to know.

    node_of_rank: nodes are numbered by their first rank; switch_n, bandwidth_n: of each node, its switch and its
    link's bytes/s each way; uplink: bytes/s of a switch (unused with one switch); latency_s: of a small message
    between nodes; rank_flop: flop/s; rank_bytes: memory for weights.
    """

    name: str
    node_of_rank: tuple[int, ...]
    switch_n: tuple[int, ...]
    bandwidth_n: tuple[float, ...]
    uplink: float
    latency_s: float
    rank_flop: float
    rank_bytes: float

    @property
    def nodes(self) -> int:
        return len(self.switch_n)

    def __str__(self) -> str:
        sizes = sorted(set(np.bincount(self.node_of_rank).tolist()))
        ranks = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
        switches = len(set(self.switch_n))
        gb = [f"{b / 1e9:.3g}" for b in dict.fromkeys((min(self.bandwidth_n), max(self.bandwidth_n)))]
        return (f"{self.name}: {self.nodes} nodes of {ranks} ranks on {switches} switch{'es' if switches > 1 else ''}, "
                f"{' to '.join(gb)} GB/s and {self.latency_s * 1e6:.3g} us between nodes, {self.rank_flop / 1e12:.3g} TFLOP/s per rank")


def read_machine(path: str) -> Machine:
    """The machine of a cluster file. Raises UserError naming file, key and value."""
    return machine_of(read_cluster(path))


def machine_of(c: ClusterFile) -> Machine:
    """Of several levels of switches a placement sees the lowest, the leaves."""
    nodes = np.arange(c.nodes.count)
    switch_n = nodes // c.switch[0].nodes if c.switch else np.zeros_like(nodes)
    bandwidth, latency_s = (c.node_bytes_per_s(), c.nic.latency_us * 1e-6) if c.nic else (np.inf, 0.0)
    return Machine(c.name, tuple(np.repeat(nodes, c.nodes.ranks_per_node).tolist()), tuple(switch_n.tolist()),
                   (bandwidth,) * c.nodes.count, c.uplinks()[0] if c.switch else 0.0,
                   latency_s, c.rank.tflop_per_s * 1e12, c.rank.memory_gib * 2**30)
