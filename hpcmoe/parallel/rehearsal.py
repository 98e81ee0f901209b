"""MoE layers of one stage on made-up rows, executed by the real engine and schedule, with a rank's real experts.

What a benchmark and the choice of lanes measure: the exchange and the experts' products, in the order and with the waits that
a run has. Attention, router and merge take no time in it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Callable

import numpy as np
from mpi4py import MPI

from hpcmoe.compute.base import Compute, Pending, Sizes
from hpcmoe.compute.relay import Chosen, Relay
from hpcmoe.config import RouterConfig
from hpcmoe.model.route import route
from hpcmoe.parallel.engine import Engine
from hpcmoe.parallel.exchange import Channel
from hpcmoe.parallel.flat import Flags
from hpcmoe.parallel.handle import Handle, Waiter
from hpcmoe.parallel.hierarchical import open_exchange
from hpcmoe.parallel.ops import Op
from hpcmoe.parallel.schedule import Role, build
from hpcmoe.parallel.world import World
from hpcmoe.report.record import RankRecord

NOT_THERE = ("RECV", "ATTEND", "GATE", "MERGE", "SAMPLE")


class Rows:
    """What exchanges ask of a Compute: rows with random choices of experts on leaders; all else is `compute`'s.

    rows_m: rows of each micro-batch on this rank, None where it does not lead.
    """

    def __init__(self, compute: Compute, router: RouterConfig, rows_m: list[int] | None, seed: int):
        self.compute, self.device = compute, compute.device
        self.send_width, self.back_width = compute.send_width, compute.back_width
        self.routed_m: list[Pending] = []
        self.back: dict[int, Any] = {}
        if rows_m is None:
            return
        rng = np.random.default_rng(seed)
        self.expert_mtk = [np.argsort(rng.random((n, router.experts)), axis=1)[:, :router.top_k] for n in rows_m]
        routes = [route(expert_tk, router.experts) for expert_tk in self.expert_mtk]
        self.routed_m = [Pending(self.device.event(), lambda r=r: (r.n_send_e,)) for r in routes]
        # fp32 ones are small normal numbers in every type that rows travel in
        ones = [np.ones((len(r.token_s), -(-self.send_width // 4)), np.float32) for r in routes]
        self.x_msd = [self.device.upload(x.view(np.uint8)[:, :self.send_width].copy()) for x in ones]

    def chosen(self, m: int) -> Chosen:
        expert_tk = self.expert_mtk[m]
        return Chosen(expert_tk, np.ones(expert_tk.shape, np.float32), self.x_msd[m], np.arange(len(expert_tk)))

    def relay(self, m: int) -> Relay:
        return self.compute.relay(m)

    def outgoing(self, m: int):
        return self.x_msd[m]

    def incoming(self, m: int, count: int):
        return self.compute.incoming(m, count)

    def returning(self, m: int, count: int):
        if m not in self.back or len(self.back[m]) < count:
            self.back[m] = self.device.empty((count, self.back_width // 4), np.float32)
        return self.back[m][:count]


class Rehearsal:
    """`micros` micro-batches through `layers` of this rank's stage. Collective over the stage.

    router: the model's; rows_m: rows of a leader in each micro-batch, the same on all; name: of the schedule; lanes: of it; layers:
    numbers of layers whose experts this rank holds, equally many on all ranks. seconds(arithmetic=False): the same without products.
    """

    def __init__(self, world: World, compute: Compute, router: RouterConfig, rows_m: list[int], lanes: int, layers: list[int],
                 name: str, wait: Waiter):
        self.comm, self.compute, self.layers = world.comm, compute, layers
        of_slots = replace(router, experts=world.layout.slots(router.experts))
        self.rows = Rows(compute, of_slots, None if world.leader is None else rows_m, 1 + world.rank)
        here, micros = world.here, len(rows_m)
        self.record = RankRecord(world.rank, "", 0, here.dp, here.stage, here.place, world.leader is not None, layers,
                                 list(world.layout.slots_of(here.place, router.experts)))
        channels = [Channel(comm, compute.device, lane) for comm, lane in zip(world.lanes[:lanes], compute.lanes)]
        sizes = Sizes(micros, lanes, max(rows_m), max(rows_m), 0, 0, 0, 0)
        self.exchange = open_exchange(world, self.rows, channels, self.record, router, sizes)
        self.got: dict[int, tuple[Any, np.ndarray]] = {}  # by micro-batch: what came in, and from whom
        self.made: dict[int, Any] = {}
        self.arithmetic = True
        schedule = build(name, 1, len(layers), micros, lanes)
        program = schedule.programs[Role(0, world.leader is not None)]
        self.engine = Engine(program, self._table(), wait, self.record, time.monotonic, False, lambda number: None)

    def _table(self) -> dict[str, Callable[[Op], Handle | None]]:
        table: dict = dict.fromkeys(NOT_THERE, lambda op: None)
        for method in (self._counts, self._dispatch, self._expert, self._combine):
            table[method.__name__[1:].upper()] = self._on_lane(method)
        return table

    def _on_lane(self, method):
        def call(op: Op):
            with self.compute.lane(op.micro):
                return method(op)
        return call

    def _counts(self, op: Op) -> Handle:
        routed = self.rows.routed_m[op.micro] if self.rows.routed_m else None
        return self.exchange.counts(op, routed, lambda: Flags(0, 0, 0, 0))

    def _dispatch(self, op: Op) -> Handle | None:
        n_recv_re, _ = self.exchange.arrived(op)
        x_id, handle = self.exchange.dispatch(op)
        self.got[op.micro] = (x_id, n_recv_re)
        return handle

    def _expert(self, op: Op) -> None:
        if self.arithmetic:
            self.made[op.micro] = self._products(op.micro, op.layer)

    def _products(self, m: int, layer: int):
        x_id, n_recv_re = self.got[m]
        like = self.compute.incoming(m, 0)
        if x_id.dtype != like.dtype:
            x_id = x_id.view(like.dtype)
        return self.compute.expert(m, self.layers[layer], x_id, n_recv_re)

    def _combine(self, op: Op) -> Handle | None:
        return self.exchange.combine(op, self.made[op.micro])

    # ------------------------------------------------------------ measuring
    def run(self, arithmetic: bool = True) -> None:
        """All layers once; without arithmetic only after once with it."""
        self.arithmetic = arithmetic
        self.engine.run(lambda: False, lambda number: None)

    def products(self) -> None:
        """The same products without an exchange, after a run; returns when they are done."""
        for layer in range(len(self.layers)):
            for m in self.got:
                with self.compute.lane(m):
                    self._products(m, layer)
        for lane in self.compute.lanes:
            with lane:
                self.compute.device.event().record().wait()

    def close(self) -> None:
        self.exchange.close()


def medians(comm, turns: dict[Any, Callable[[], None]], repeats: int, limit_s: float) -> dict[Any, float]:
    """Seconds of each of several functions, called by turns: each time that of the slowest rank; the same on all ranks.

    No turn begins after limit_s seconds, but for the first.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in turns}
    begin = time.monotonic()
    for turn in range(repeats):
        if turn and comm.allreduce(time.monotonic() - begin, MPI.MAX) > limit_s:
            break
        for name, func in turns.items():
            comm.Barrier()
            start = time.monotonic()
            func()
            seconds[name].append(time.monotonic() - start)
    slowest = {name: np.max(comm.allgather(values), axis=0) for name, values in seconds.items()}
    return {name: float(np.median(values)) for name, values in slowest.items()}
