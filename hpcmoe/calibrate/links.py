"""Measures what exchanges, waiting and shared cores take on the ranks of a running job, and writes a cluster file of it.

Exchanges are the engine's own (parallel/flat.py), on made-up rows, one op after the other as in a run; hosts' times are what the op's call
takes before it waits.
"""

from __future__ import annotations

import json
import os
import time
from typing import Callable, NamedTuple

import numpy as np

from hpcmoe import linear, memory
from hpcmoe.calibrate.engine import measure_engine
from hpcmoe.cluster.kernels import Calibration
from hpcmoe.config import RouterConfig
from hpcmoe.errors import UserError
from hpcmoe.parallel.flat import Flags
from hpcmoe.parallel.layout import Layout
from hpcmoe.parallel.ops import Op
from hpcmoe.parallel.polling import PAUSE_S, YIELDS

ROWS, WIDTHS, ROUNDS = (1, 16, 128), (64, 256, 1024), 30
BETWEEN, TRIPS = (64, 64 << 10, 256 << 10, 1 << 20), 7  # bytes
ANNOUNCED_KIB = 16.0  # about where MPIs announce a message before they send it
WORK_S = 0.15


class Links(NamedTuple):
    """Of a node: us of a message's and of an exchange's host, of the rest of a small exchange; GB/s of a rank; cores, and what they carry
    together; us of a look of a waiting rank, and of one with a pause. Between nodes: us of a small message,
    us that a large one takes more, GB/s of a node; 0 where there is one."""

    message_us: float
    exchange_us: float
    latency_us: float
    rank_gb_per_s: float
    cores: int
    together: float
    look_us: float
    pause_us: float
    nic_us: float = 0.0
    announce_us: float = 0.0
    nic_gb_per_s: float = 0.0


def measure_links(comm, c: Calibration, tell: Callable[[str], None]) -> Links:
    """Collective; the same on all ranks. c: of a rank here. Raises UserError, on all ranks, where a node has one rank only."""
    from hpcmoe.parallel.world import node_names
    names = node_names(comm)
    hosts = list(dict.fromkeys(names))
    if min(map(names.count, hosts)) < 2:
        raise UserError("calibrate links: a node has one rank only: expected at least 2 on each: their exchanges are measured")
    node = comm.Split(hosts.index(names[comm.rank]), comm.rank)
    cores = memory.cores()
    message_us = _message_us(node)
    host_us, (rest_us, gb_per_s) = _host_us(node, c), _exchanges(node, cores)
    tell(f"exchanges of {node.size} ranks: host {host_us:.3g} us, the rest of a small one {rest_us:.3g} us, {gb_per_s:.3g} GB/s from a rank")
    together, (look_us, pause_us) = _together(node, cores), _looks_us(node)
    tell(f"{min(cores, node.size)} cores together: {together:.3g} of one alone; {look_us:.3g} us each time that a waiting rank looks, "
         f"{pause_us:.3g} us with a pause")
    between = _between(comm, names, cores) if len(hosts) > 1 else (0.0, 0.0, 0.0)
    exchange_us = max(0.0, host_us - 2 * (node.size - 1) * message_us)
    found = Links(message_us, exchange_us, rest_us, gb_per_s, cores, together, look_us, pause_us, *between)
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


def _host_us(comm, c: Calibration) -> float:
    """Of an exchange: what COUNTS, DISPATCH and COMBINE take of the host in a job on these ranks more than on one, in the mean."""
    found, calls = measure_engine(comm, c, "auto", "fp32" if c.gemm.item_bytes == 4 else "bf16"), c.calls
    return max(0.0, (found.counts_us - calls.counts_us + 2 * (found.move_us - calls.move_us)) / 3)


def _exchanges(comm, cores: int) -> tuple[float, float]:
    """(us that a small exchange takes after it is posted, GB/s that leave a rank), means of counts, dispatch and combine."""
    from hpcmoe.compute.madeup import MadeUpRows
    from hpcmoe.parallel.trial import Trial
    from hpcmoe.parallel.world import World
    world = World(comm, Layout(1, 1, comm.size), 1, ["here"] * comm.size)
    world.transport = "ialltoallv"
    router = RouterConfig(comm.size, min(2, comm.size))
    rest_us, bytes_i, seconds_i = [], [], []
    for width in WIDTHS:
        for count in ROWS:
            rows = MadeUpRows(router, width, 4 * width, count, [comm.rank], 1 + comm.rank)
            trial = Trial(world, router, rows, (world.transport,), comm.size > cores)
            rows.checking = False
            measured = [_layer(comm, trial, rows) for _ in range(ROUNDS)]
            trial.close()
            host_k, rest_k = (np.median(comm.allgather(part), axis=(0, 1)) for part in zip(*measured))
            sent = 4 * width * count * router.top_k * (comm.size - 1) / comm.size
            bytes_i += [sent, sent]
            seconds_i += (host_k + rest_k)[1:].tolist()
            if count == min(ROWS):
                rest_us.append(1e6 * float(rest_k.mean()))
    slope = float(np.polyfit(bytes_i, seconds_i, 1, w=1 / np.array(seconds_i))[0])
    return float(np.mean(rest_us)), 1e-9 / max(slope, 1e-15)


def _layer(comm, trial, rows) -> tuple[list[float], list[float]]:
    """(s that the host takes, s that it then waits) of counts, dispatch and combine of one layer, each begun by all ranks at once."""
    exchange, host, rest = next(iter(trial.exchanges.values())), [], []

    def step(work: Callable):
        comm.Barrier()
        start = time.monotonic()
        handle = work()
        posted = time.monotonic()
        if handle is not None:
            trial.wait(handle, "an exchange")
        host.append(posted - start)
        rest.append(time.monotonic() - posted)

    found = {}

    def dispatch():
        found["n_recv_re"], _ = exchange.arrived(Op("DISPATCH", 0, 0))
        found["x"], handle = exchange.dispatch(Op("DISPATCH", 0, 0))
        return handle

    step(lambda: exchange.counts(Op("COUNTS", 0, 0), rows.routed, lambda: Flags(0, 0, 0, 0)))
    step(dispatch)
    y_id = rows.expert(found["x"], found["n_recv_re"])
    step(lambda: exchange.combine(Op("COMBINE", 0, 0), y_id))
    return host, rest


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


def _looks_us(comm) -> tuple[float, float]:
    """What a rank that waits as crowded ranks do takes of a core: us of a look without a pause, while all ranks share one core and
    take turns, and of a pause with the look after it."""
    from hpcmoe.parallel.handle import Handle
    message, mine, turns, pauses = np.zeros(1), os.sched_getaffinity(0), [], []
    for _ in range(ROUNDS):
        handle = Handle(lambda: [comm.Irecv(message, (comm.rank - 1) % comm.size, 5)])
        os.sched_setaffinity(0, {min(mine)})
        comm.Barrier()
        start = time.monotonic()
        for _ in range(YIELDS):
            handle.test()
            os.sched_yield()
        turns.append((time.monotonic() - start) / YIELDS / comm.size)
        os.sched_setaffinity(0, mine)
        start = time.thread_time()
        for _ in range(YIELDS):
            time.sleep(PAUSE_S)
            handle.test()
        pauses.append((time.thread_time() - start) / YIELDS)
        comm.Barrier()
        comm.Send(message, (comm.rank + 1) % comm.size, 5)
        while not handle.test():
            pass
    return 1e6 * float(np.percentile(comm.allgather(turns), 25)), _median(comm, pauses)  # others on that one core would count as turns


def _between(comm, names: list[str], cores: int) -> tuple[float, float, float]:
    """(us of a small message, us that a large one takes more, GB/s of a node) between nodes: every rank sends to its like on the next node while
    it hears from the one before, as in an exchange; medians of the slowest rank."""
    from hpcmoe.parallel.handle import Handle, Waiter
    hosts = list(dict.fromkeys(names))
    within = [[r for r, name in enumerate(names) if name == host] for host in hosts]
    node = hosts.index(names[comm.rank])
    place = within[node].index(comm.rank)
    after, before = (within[(node + step) % len(hosts)][place % len(within[(node + step) % len(hosts)])] for step in (1, -1))
    wait, seconds = Waiter(len(within[node]) > cores // len(hosts)), []
    for nbytes in BETWEEN:
        out, back, times = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8), []
        for _ in range(TRIPS):
            comm.Barrier()
            start = time.monotonic()
            wait(Handle(lambda: [comm.Irecv(back, before, 7), comm.Isend(out, after, 7)]), "a message between nodes")
            times.append(time.monotonic() - start)
        seconds.append(float(np.median(np.max(comm.allgather(times), axis=0))))
    rate = (BETWEEN[-1] - BETWEEN[-2]) / max(seconds[-1] - seconds[-2], 1e-9)  # bytes/s of a rank, beside the others of its node
    large = float(np.mean([s - n / rate for n, s in zip(BETWEEN[1:], seconds[1:])]))
    return 1e6 * seconds[0], max(0.0, 1e6 * (large - seconds[0])), 1e-9 * rate * len(within[node])


def cluster_toml(links: Links, name: str, nodes: int, ranks_per_node: int, memory_gib: float, tflop_per_s: float, calibration: str, source: str) -> str:
    """A cluster file's text."""
    nic = f"[nic]\nper_node = 1\nbandwidth_gb_per_s = {links.nic_gb_per_s}\nlatency_us = {links.nic_us}\n" \
          f"announce_us = {links.announce_us}\nannounce_kib = {ANNOUNCED_KIB}\n\n" if nodes > 1 else ""
    return (f"# {source}\nname = {json.dumps(name)}\ncalibration = {json.dumps(calibration)}\n\n"
            f"[nodes]\ncount = {nodes}\nranks_per_node = {ranks_per_node}\n\n"
            f"[rank]\nmemory_gib = {memory_gib:.4g}\ntflop_per_s = {tflop_per_s:.4g}\n\n"
            f"[inside]\nrank_gb_per_s = {links.rank_gb_per_s}\nlatency_us = {links.latency_us}\n\n{nic}"
            f"[mpi]\nmessage_us = {links.message_us}\nexchange_us = {links.exchange_us}\n\n"
            f"[cores]\nper_node = {links.cores}\ntogether = {links.together}\nlook_us = {links.look_us}\npause_us = {links.pause_us}\n")
