"""A cluster file (inputs/clusters/*.toml): nodes, ranks, links, switches and what MPI costs, each number with its unit.

`hpcmoe place` needs name, nodes, rank, nic and switch; a simulation needs inside, mpi and a calibration as well.
GB/s are 1e9 bytes/s; every bandwidth is of one direction unless the key says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpcmoe.config import from_dict
from hpcmoe.errors import UserError, at
from hpcmoe.files import read_toml

MOST_RANKS = 1 << 20


@dataclass(frozen=True)
class NodesTable:
    """count: nodes; ranks_per_node: ranks of the job on each (one per GPU or core), in the order of ranks."""

    count: int
    ranks_per_node: int


@dataclass(frozen=True)
class RankTable:
    """memory_gib: of a rank; tflop_per_s: peak of its products in the run's type (`place` weighs balance with it)."""

    memory_gib: float
    tflop_per_s: float


@dataclass(frozen=True)
class InsideTable:
    """Between ranks of a node. rank_gb_per_s: a rank's port (NVLink, or what a core copies), each way; node_gb_per_s: all
    of a node's ranks together, both ways (a shared memory, a bus); left out: no such limit. efficiency: the part of
    both that messages reach. latency_us: of a small message. host_rank_gb_per_s: a rank's messages to others of its node through
    host memory, each way, where its rows are on a GPU (transport staged)."""

    latency_us: float
    rank_gb_per_s: float | None = None
    node_gb_per_s: float | None = None
    efficiency: float = 1.0
    host_rank_gb_per_s: float | None = None


@dataclass(frozen=True)
class NicTable:
    """Network adapters. per_node: adapters that a node's ranks share evenly, in their order; bandwidth_gb_per_s: of one;
    latency_us: of a small message between nodes; rank_gb_per_s: a rank's way to its adapter (PCIe); node_gb_per_s: all
    of a node's adapters together; left out: no such limit. efficiency: the part of bandwidth that messages reach. announce_us: what messages of
    more than announce_kib take longer, since an MPI asks first whether they may come (rendezvous)."""

    bandwidth_gb_per_s: float
    latency_us: float
    per_node: int = 1
    rank_gb_per_s: float | None = None
    node_gb_per_s: float | None = None
    efficiency: float = 1.0
    announce_us: float = 0.0
    announce_kib: float = 16.0


@dataclass(frozen=True)
class SwitchTable:
    """One level of switches, leaves first. nodes: below one switch of the level; uplink_gb_per_s: what it carries to the
    level above, or oversubscription: what can come from below, over that. latency_us: added to a message that goes above."""

    nodes: int
    uplink_gb_per_s: float | None = None
    oversubscription: float | None = None
    latency_us: float = 0.0


@dataclass(frozen=True)
class MpiTable:
    """message_us: host time per message, on the sender and on the receiver; exchange_us: of an exchange besides its messages."""

    message_us: float
    exchange_us: float = 0.0


@dataclass(frozen=True)
class CoresTable:
    """Of a node whose ranks are CPU cores: per_node: how many there are; together: how much they carry all at once, in cores that
    are alone (less than per_node where they take memory from each other); where ranks are more than cores (parallel/polling.py), look_us:
    of a core, each time that a waiting rank looks whether it can go on while others take turns; pause_us: of a pause and the look after it."""

    per_node: int
    together: float
    look_us: float = 0.0
    pause_us: float = 0.0


@dataclass(frozen=True)
class ClusterFile:
    """A cluster file as it stands. calibration: the kernels of a rank: a path relative to the file, or a shipped name."""

    name: str
    nodes: NodesTable
    rank: RankTable
    nic: NicTable | None = None
    inside: InsideTable | None = None
    mpi: MpiTable | None = None
    switch: tuple[SwitchTable, ...] = ()
    calibration: str = ""
    cores: CoresTable | None = None

    @property
    def ranks(self) -> int:
        return self.nodes.count * self.nodes.ranks_per_node

    def node_bytes_per_s(self) -> float:
        """What all adapters of a node carry, each way, as messages reach it."""
        together = self.nic.per_node * self.nic.bandwidth_gb_per_s
        return min(together, self.nic.node_gb_per_s or together) * self.nic.efficiency * 1e9

    def uplinks(self) -> list[float]:
        """bytes/s of one switch of each level to the level above, each way."""
        found, below, nodes_below = [], self.node_bytes_per_s() if self.nic else 0.0, 1
        for level in self.switch:
            up = level.uplink_gb_per_s * 1e9 if level.uplink_gb_per_s else below * (level.nodes / nodes_below) / level.oversubscription
            found.append(up)
            below, nodes_below = up, level.nodes
        return found


NEEDED_TO_SIMULATE = ("inside", "mpi", "calibration")


def read_cluster(path: str | Path, simulate: bool = False) -> ClusterFile:
    """A cluster file; simulate: with all that a simulation needs. Raises UserError naming file, key, value and what was expected."""
    where = str(path)
    found = from_dict(ClusterFile, read_toml(path), where)
    for name in ("nodes", "rank", "nic", "inside", "mpi", "cores"):
        if getattr(found, name) is not None:
            _check_numbers(where, name, vars(getattr(found, name)))
    for i, level in enumerate(found.switch):
        _check_numbers(where, f"switch[{i}]", vars(level))
    _check_shape(where, found)
    if simulate:
        for name in NEEDED_TO_SIMULATE:
            if not getattr(found, name):
                raise UserError(f"{where}: {name} is missing: a simulation needs it")
    return found


def _check_numbers(where: str, table: str, values: dict) -> None:
    """Counts and rates above 0, latencies and times not below, efficiencies at most 1; all finite."""
    for name, value in values.items():
        if value is None:
            continue
        low = name.endswith("_us")
        if not (0 < value < float("inf") or (low and value == 0)):
            raise at(where, f"{table}.{name}", value, f"a number {'>=' if low else '>'} 0")
        if name == "efficiency" and value > 1:
            raise at(where, f"{table}.{name}", value, "a part: above 0, at most 1")


def _check_shape(where: str, c: ClusterFile) -> None:
    """What must fit together."""
    if c.ranks > MOST_RANKS:
        raise at(where, "nodes.count", c.nodes.count, f"at most {MOST_RANKS} ranks, nodes.ranks_per_node = "
                 f"{c.nodes.ranks_per_node} on each")
    if c.nodes.count > 1 and c.nic is None:
        raise UserError(f"{where}: nic is missing: {c.nodes.count} nodes need adapters")
    if c.nic and c.nodes.ranks_per_node % c.nic.per_node:
        raise at(where, "nic.per_node", c.nic.per_node, f"a divisor of nodes.ranks_per_node = {c.nodes.ranks_per_node}: ranks share "
                 "adapters evenly (a rank with several: one with their bandwidth)")
    if c.inside and c.nodes.ranks_per_node > 1 and c.inside.rank_gb_per_s is None and c.inside.node_gb_per_s is None:
        raise UserError(f"{where}: inside has neither rank_gb_per_s nor node_gb_per_s: ranks of a node need a link")
    if c.cores and c.cores.together > c.cores.per_node:
        raise at(where, "cores.together", c.cores.together, f"at most cores.per_node = {c.cores.per_node}")
    below = 1
    for i, level in enumerate(c.switch):
        if (level.uplink_gb_per_s is None) == (level.oversubscription is None):
            raise at(where, f"switch[{i}].uplink_gb_per_s", level.uplink_gb_per_s, "either this or oversubscription")
        if level.nodes % below:
            raise at(where, f"switch[{i}].nodes", level.nodes, f"a multiple of the {below} nodes of a switch below")
        below = level.nodes
