"""The machine below a running job: nodes, switches, adapters, and what a message between each two nodes takes."""

from __future__ import annotations

import os
import time
from typing import Callable, NamedTuple

import numpy as np

from hpcmoe import affinity, memory
from hpcmoe.cluster.machine import Machine
from hpcmoe.device import gpus
from hpcmoe.parallel.world import node_names

LARGE = 1 << 20  # bytes of the messages that measure bandwidth
TRIPS = 8
SIZE = 384       # of the square product that measures arithmetic


class Rank(NamedTuple):
    """What one rank tells: its node, its leaf switch, its GPUs and network adapters in words, flop/s, memory in bytes."""

    host: str
    switch: str
    devices: str
    flop: float
    nbytes: int


def discover(comm, say: Callable[[str], None]) -> Machine:
    """Collective: the machine of the ranks of `comm`, the same on all of them.

    A node's bandwidth is the median over the other nodes of what two ranks reach, one on each: a node with several
    adapters can carry more, all nodes alike. A switch's uplink is taken to carry what its nodes can.
    """
    host = node_names(comm)[comm.rank]
    found = comm.allgather(Rank(host, leaf_switch(os.environ), _devices(), _flop_rate(), memory.available()))
    hosts = list(dict.fromkeys(r.host for r in found))
    first_n = [next(i for i, r in enumerate(found) if r.host == h) for h in hosts]
    latency_nn, bandwidth_nn = _pairs(comm, first_n)
    names = list(dict.fromkeys(found[r].switch for r in first_n))
    switch_n = [names.index(found[r].switch) for r in first_n]
    counts = [sum(r.host == h for r in found) for h in hosts]
    for n, r in enumerate(first_n[:8]):
        say(f"node {n}: {hosts[n]}, {counts[n]} ranks, {found[r].devices}, switch {found[r].switch or 'unknown'}")
    others = ~np.eye(len(hosts), dtype=bool)
    bandwidth_n = [float(np.median(bandwidth_nn[n][others[n]])) if len(hosts) > 1 else np.inf for n in range(len(hosts))]
    uplink = min(sum(b for b, s in zip(bandwidth_n, switch_n) if s == w) for w in set(switch_n))
    share = min(found[r].nbytes / count for r, count in zip(first_n, counts))
    return Machine("this job", tuple(hosts.index(r.host) for r in found), tuple(switch_n), tuple(bandwidth_n), uplink,
                   float(np.median(latency_nn[others])) if len(hosts) > 1 else 0.0, min(r.flop for r in found), share)


def leaf_switch(env) -> str:
    """The leaf switch of this node by Slurm's topology plugin ("s0.s3.node17": "s0.s3"), "" where it says nothing."""
    return env.get("SLURM_TOPOLOGY_ADDR", "").rpartition(".")[0]


def _devices() -> str:
    names = [gpu.name for gpu in gpus()]
    nics = list(affinity.adapters())
    return f"{len(names)} GPU{'s' * (len(names) != 1)}{' (' + names[0] + ')' if names else ''}, adapters: {', '.join(nics) or 'none seen'}"


def _flop_rate() -> float:
    """flop/s of a square fp32 product on this rank's CPU, the best of a few."""
    a = np.ones((SIZE, SIZE), dtype=np.float32)
    return 2 * SIZE**3 / min(_timed(lambda: a @ a) for _ in range(5))


def _timed(work: Callable) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _pairs(comm, first_n: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Collective: (s of a small message, bytes/s of a large one) between the first ranks of each two nodes: [n, n].

    In a round every node meets one other (the circle method for tournaments), so that there are as many rounds as nodes.
    """
    nodes, mine = len(first_n), np.zeros((2, len(first_n), len(first_n)))
    players = nodes + nodes % 2
    me = first_n.index(comm.rank) if comm.rank in first_n else None
    for turn in range(players - 1):
        comm.Barrier()
        other = None if me is None else _opponent(me, turn, players)
        if other is None or other >= nodes:
            continue
        latency, large = (_half_trip(comm, first_n[other], me < other, nbytes) for nbytes in (8, LARGE))
        mine[:, me, other] = latency, LARGE / large
    total = np.empty_like(mine)
    comm.Allreduce(mine, total)
    return total[0], total[1]


def _opponent(me: int, turn: int, players: int) -> int:
    last = players - 1
    if me == last:
        return turn * (players // 2) % last
    other = (turn - me) % last
    return last if other == me else other


def _half_trip(comm, other: int, begins: bool, nbytes: int) -> float:
    """Half of the quickest of a few round trips, in s."""
    out, back = np.ones(nbytes, dtype=np.uint8), np.empty(nbytes, dtype=np.uint8)

    def trip() -> None:
        if begins:
            comm.Send(out, other)
            comm.Recv(back, other)
        else:
            comm.Recv(back, other)
            comm.Send(out, other)

    return min(_timed(trip) for _ in range(TRIPS)) / 2
