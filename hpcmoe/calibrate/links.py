"""Measures what exchanges, waiting and shared cores take on the ranks of a running job, and writes a cluster file of it.

Exchanges are the engine's own (parallel/flat.py), on made-up rows, one op after the other as in a run; hosts' times are what the op's call
takes before it waits.
"""

from __future__ import annotations

import json
import time
from typing import Callable, NamedTuple

import numpy as np

from hpcmoe import linear, memory
from hpcmoe.config import RouterConfig
from hpcmoe.errors import UserError

ROWS, WIDTHS, ROUNDS = (1, 16, 128), (64, 256, 1024), 30
WORK_S, PAUSE_S, PAUSES = 0.15, 0.01, 20


class Links(NamedTuple):
    """Of a node: us of a message's and of an exchange's host, of the rest of a small exchange; GB/s of a rank; cores, and what they carry
    together; the part of a core that a rank takes while it waits. Between nodes: us, GB/s; 0 where there is one."""

    message_us: float
    exchange_us: float
    latency_us: float
    rank_gb_per_s: float
    cores: int
    together: float
    poll: float
    nic_us: float = 0.0
    nic_gb_per_s: float = 0.0


def measure_links(comm, tell: Callable[[str], None]) -> Links:
    """Collective; the same on all ranks. Raises UserError, on all ranks, where a node has one rank only."""
    from hpcmoe.parallel.world import node_names
    names = node_names(comm)
    hosts = list(dict.fromkeys(names))
    if min(map(names.count, hosts)) < 2:
        raise UserError("calibrate links: a node has one rank only: expected at least 2 on each: their exchanges are measured")
    node = comm.Split(hosts.index(names[comm.rank]), comm.rank)
    cores = memory.cores()
    message_us = _message_us(node)
    host_us, rest_us, gb_per_s = _exchanges(node, cores)
    tell(f"exchanges of {node.size} ranks: host {host_us:.3g} us, the rest of a small one {rest_us:.3g} us, {gb_per_s:.3g} GB/s from a rank")
    together, poll = _together(node, cores), _poll(node)
    tell(f"{min(cores, node.size)} cores together: {together:.3g} of one alone; a waiting rank takes {poll:.2g} of a core where ranks are more than cores")
    nic_us, nic_gb_per_s = _between(comm, hosts) if len(hosts) > 1 else (0.0, 0.0)
    exchange_us = max(0.0, host_us - 2 * (node.size - 1) * message_us)
    found = Links(message_us, exchange_us, rest_us, gb_per_s, cores, together, poll, nic_us, nic_gb_per_s)
    return comm.bcast(Links(*(float(f"{x:.4g}") for x in found))._replace(cores=cores))


def _median(comm, seconds: list[float]) -> float:
    """Over repeats and ranks, us."""
    return 1e6 * float(np.median(comm.allgather(seconds)))


def _message_us(comm) -> float:
    """Host time of posting a small message, of sending and of receiving."""
    out, back, seconds = np.zeros(64, np.uint8), np.empty(64, np.uint8), []
    for _ in range(ROUNDS):
        comm.Barrier()
        start = time.monotonic()
        requests = [comm.Irecv(back, (comm.rank - 1) % comm.size, 3), comm.Isend(out, (comm.rank + 1) % comm.size, 3)]
        seconds.append((time.monotonic() - start) / 2)
        for request in requests:
            request.Wait()
    return _median(comm, seconds)


def _exchanges(comm, cores: int) -> tuple[float, float, float]:
    """(us of the host, us of the rest of a small exchange, GB/s that leave a rank) of dispatch and combine."""
    from hpcmoe.parallel.exchange import TRANSPORTS, Channel, Plan, row_type
    from hpcmoe.parallel.handle import Waiter
    from hpcmoe.device import Device
    device = Device()
    channel, wait, hosts, rests, bytes_i, seconds_i = Channel(comm, device, device.lane()), Waiter(comm.size > cores), [], [], [], []
    for width in WIDTHS:
        row = row_type(4 * width)
        for rows in ROWS:
            n_r = np.full(comm.size, rows, dtype=np.int64)
            send, recv = (np.ones((rows * comm.size, width), np.float32) for _ in range(2))
            host, whole = [], []
            for _ in range(ROUNDS):
                comm.Barrier()
                start = time.monotonic()
                plan = Plan.of(n_r, n_r, comm.rank)
                handle = TRANSPORTS["ialltoallv"](channel, send, recv, plan, row)
                posted = time.monotonic()
                wait(handle, "exchange")
                host.append(posted - start)
                whole.append(time.monotonic() - start)
            bytes_i.append(4 * width * rows * (comm.size - 1))
            seconds_i.append(_median(comm, whole))
            if rows * width <= 64 * 16:
                hosts.append(_median(comm, host))
                rests.append(seconds_i[-1] - hosts[-1])
        row.Free()
    slope_us = max(1e-9, float(np.polyfit(bytes_i, seconds_i, 1, w=1 / np.array(seconds_i))[0]))
    return float(np.median(hosts)), max(0.0, float(np.median(rests))), 1e-3 / slope_us


def _work(seconds: float) -> int:
    """How often a piece of a run's arithmetic is done in so many seconds: small products with many weights, passes over rows."""
    backend, rng = linear.choose("auto", "fp32"), np.random.default_rng(0)
    products = [backend.linear(rng.standard_normal((208, 192), dtype=np.float32)) for _ in range(64)]
    x_mk, logit_nv = np.ones((16, 192), np.float32), rng.standard_normal((48, 2048), dtype=np.float32)
    products[0](x_mk)
    yield_at, done = time.monotonic() + seconds, 0
    while time.monotonic() < yield_at:
        for product in products:
            product(x_mk)
        np.exp(logit_nv - logit_nv.max(axis=1, keepdims=True)).sum(axis=1)
        done += 1
    return done


def _together(comm, cores: int) -> float:
    """What as many ranks as there are cores do at the same time, over what one does alone."""
    many, found = min(cores, comm.size), []
    for _ in range(3):
        alone = _work(WORK_S) if comm.rank == 0 else 0
        _quiet(comm)
        all_ = _work(WORK_S) if comm.rank < many else 0
        _quiet(comm)
        found.append(comm.allreduce(all_) / comm.bcast(alone) * cores / many)
    return min(float(cores), float(np.median(found)))


def _quiet(comm) -> None:
    """A barrier whose waiting takes no core from others."""
    barrier = comm.Ibarrier()
    while not barrier.Test():
        time.sleep(0.002)


def _poll(comm) -> float:
    """CPU time over time of a rank that waits as crowded ranks do."""
    from hpcmoe.parallel.handle import Handle, Waiter
    wait, shares, message = Waiter(True), [], np.zeros(1)
    for _ in range(PAUSES):
        comm.Barrier()
        if comm.rank == 0:
            time.sleep(PAUSE_S)
            for other in range(1, comm.size):
                comm.Send(message, other, 5)
            continue
        cpu, start = time.thread_time(), time.monotonic()
        wait(Handle(lambda: [comm.Irecv(message, 0, 5)]), "a message")
        shares.append((time.thread_time() - cpu) / (time.monotonic() - start))
    every = [share for mine in comm.allgather(shares) for share in mine]
    return float(np.median(every))


def _between(comm, hosts: list[str]) -> tuple[float, float]:
    """(us, GB/s) of a message between nodes: medians over their pairs."""
    from hpcmoe.cluster.discover import discover
    machine = discover(comm, lambda text: None)
    return 1e6 * machine.latency_s, float(np.median(machine.bandwidth_n)) / 1e9


def cluster_toml(links: Links, name: str, nodes: int, ranks_per_node: int, memory_gib: float, tflop_per_s: float, calibration: str, source: str) -> str:
    """A cluster file's text."""
    nic = f"[nic]\nper_node = 1\nbandwidth_gb_per_s = {links.nic_gb_per_s}\nlatency_us = {links.nic_us}\n\n" if nodes > 1 else ""
    return (f"# {source}\nname = {json.dumps(name)}\ncalibration = {json.dumps(calibration)}\n\n"
            f"[nodes]\ncount = {nodes}\nranks_per_node = {ranks_per_node}\n\n"
            f"[rank]\nmemory_gib = {memory_gib:.4g}\ntflop_per_s = {tflop_per_s:.4g}\n\n"
            f"[inside]\nrank_gb_per_s = {links.rank_gb_per_s}\nlatency_us = {links.latency_us}\n\n{nic}"
            f"[mpi]\nmessage_us = {links.message_us}\nexchange_us = {links.exchange_us}\n\n"
            f"[cores]\nper_node = {links.cores}\ntogether = {links.together}\npoll = {links.poll}\n")
