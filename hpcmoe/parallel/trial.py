"""The exchange of the run: by name, or `hierarchical` where it wins a trial on made-up rows at start."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Callable

from mpi4py import MPI

from hpcmoe.compute.base import Sizes
from hpcmoe.compute.madeup import GpuMadeUpRows, MadeUpRows, row_width
from hpcmoe.config import ModelConfig, RouterConfig, RunJob
from hpcmoe.device import Device
from hpcmoe.errors import UserError
from hpcmoe.parallel import plan, selftest
from hpcmoe.parallel.exchange import Channel
from hpcmoe.parallel.flat import Exchange, Flags
from hpcmoe.parallel.handle import Waiter
from hpcmoe.parallel.hierarchical import HIERARCHICAL, open_exchange, relay_sizes
from hpcmoe.parallel.ops import Op
from hpcmoe.parallel.rehearsal import medians
from hpcmoe.parallel.world import World, agree
from hpcmoe.report.record import RankRecord

REPEATS, LIMIT_S = 5, 1.0


def made_up(world: World, router: RouterConfig, d: int, width: int, rows: int, device: Device = Device()) -> MadeUpRows:
    """For this rank, `rows` on each leader; width: bytes of a row of dispatch.

    Collective over world.comm. Raises AgreedError where a GPU's kernels do not compile or its memory is too small.
    """
    slots = list(world.layout.slots_of(world.here.place, router.experts))
    of_slots = replace(router, experts=world.layout.slots(router.experts))
    facts = (of_slots, d, width, None if world.leader is None else rows, slots, 1 + world.rank)
    if device.in_host_memory:
        return MadeUpRows(*facts)
    received = rows * len(world.leaders) * min(router.top_k, len(slots))
    made = agree(world.comm, GpuMadeUpRows, device, relay_sizes(world, router, rows), received, *facts)
    for first in (True, False):  # rank 0 compiles what the others then find on disk
        agree(world.comm, lambda now: made.compile() if now else None, first == (world.rank == 0))
    return made


def layer(exchange: Exchange, rows: MadeUpRows, wait: Waiter) -> None:
    """One MoE layer's exchange, there and back, of one micro-batch; returns when the device has done it, too."""
    def go(handle, kind: str) -> None:
        if handle is not None:
            wait(handle, f"trial of the exchange: {kind}")

    with rows.lanes[0]:
        if rows.routed is not None:
            rows.device.zero(rows.x_td)
        go(exchange.counts(Op("COUNTS", 0, 0), rows.routed, lambda: Flags(0, 0, 0, 0)), "COUNTS")
        n_recv_re, _ = exchange.arrived(Op("DISPATCH", 0, 0))
        x_iw, handle = exchange.dispatch(Op("DISPATCH", 0, 0))
        go(handle, "DISPATCH")
        y_id = rows.expert(x_iw, n_recv_re)
        go(exchange.combine(Op("COMBINE", 0, 0), y_id), "COMBINE")
        if rows.routed is not None:
            exchange.merge(Op("MERGE", 0, 0))
        rows.device.event().record().wait()


class Trial:
    """Several exchanges of a stage on the same made-up rows. Collective over world.comm.

    names: of transports; records: what each of them sent from this rank.
    """

    def __init__(self, world: World, router: RouterConfig, rows: MadeUpRows, names: tuple[str, ...], crowded: bool):
        self.comm, self.rows, self.wait, here = world.comm, rows, Waiter(crowded), world.here
        self.records = {name: RankRecord(world.rank, "", 0, here.dp, here.stage, here.place, world.leader is not None, [0],
                                         rows.experts.tolist()) for name in names}
        channels = [Channel(world.lanes[0], rows.device, rows.lanes[0])]
        most = world.comm.allreduce(len(rows.x_td) if rows.routed else 0, MPI.MAX)
        sizes = Sizes(1, 1, most, most, 0, 0, 0, 0)
        self.exchanges = {}
        chosen = world.transport
        for name, record in self.records.items():
            world.transport = name
            self.exchanges[name] = open_exchange(world, rows, channels, record, router, sizes)
        world.transport = chosen

    def right(self, name: str) -> bool:
        """Whether an exchange gives the right sums on all ranks."""
        self.rows.checking = True
        layer(self.exchanges[name], self.rows, self.wait)
        return all(self.comm.allgather(self.rows.right))

    def medians(self, repeats: int = REPEATS, limit_s: float = LIMIT_S) -> dict[str, float]:
        """Seconds of a layer by each exchange (see rehearsal.medians)."""
        self.rows.checking = False
        turns = {name: partial(layer, exchange, self.rows, self.wait) for name, exchange in self.exchanges.items()}
        return medians(self.comm, turns, repeats, limit_s)

    def close(self) -> None:
        for exchange in self.exchanges.values():
            exchange.close()


def choose(world: World, run: RunJob, model: ModelConfig, device: Device, room: int, rows: int, crowded: bool,
           say: Callable[[str], None]) -> dict[str, str]:
    """Sets the transports of `world`; returns the faults of the flat ones (selftest.choose). Collective.

    room: bytes for tests of large buffers; rows: of a leader in most steps (plan.usual_rows); crowded: more ranks
    than cores. Raises UserError, the same on all ranks, for a transport that fails its test.
    """
    named = run.transport == HIERARCHICAL
    world.flat, faults = selftest.choose(world.lanes[0], world.comm, "auto" if named else run.transport, device, room)
    world.transport = world.flat
    world.direct = device.in_host_memory or (world.flat != "staged" and not faults["pairwise"])
    if not named and not (run.transport == "auto" and plan.nodes_matter(world.layout, world.node_of_rank)):
        return faults
    width = row_width(model.d, run.dispatch_dtype == "fp8", device)
    rows = plan.trial_rows(rows, width, model.router.top_k)
    rows_here = made_up(world, model.router, model.d, width, rows, device)
    trial = Trial(world, model.router, rows_here, (world.transport, HIERARCHICAL), crowded)
    right = trial.right(HIERARCHICAL)
    if named and not right:
        raise UserError(f"job: run.transport = '{HIERARCHICAL}': failed its self-test: wrong sums came back")
    if named:
        world.transport = HIERARCHICAL
    elif right:
        _by_time(world, trial, rows, say)
    trial.close()
    return faults


def _by_time(world: World, trial: Trial, rows: int, say: Callable[[str], None]) -> None:
    flat = world.transport
    seconds = trial.medians()
    if seconds[HIERARCHICAL] < plan.TRIAL_MARGIN * seconds[flat]:
        world.transport = HIERARCHICAL
    figures = ", ".join(f"{name} {s * 1e3:.3g} ms" for name, s in seconds.items())
    say(f"exchange of {rows} rows per leader, there and back: {figures}: {world.transport} is taken")
