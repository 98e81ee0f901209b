"""How a layer's rows reach their experts and come back: the interface, and the flat way, straight from leader to expert.

Stage asks an exchange for COUNTS, DISPATCH, COMBINE and MERGE; what they hand each other stays in here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Callable, NamedTuple

import numpy as np

from hpcmoe.compute.base import Compute, Pending, Sizes
from hpcmoe.config import RouterConfig
from hpcmoe.parallel import exchange
from hpcmoe.parallel.exchange import Channel, Plan
from hpcmoe.parallel.handle import Handle
from hpcmoe.parallel.ops import Op
from hpcmoe.parallel.world import World
from hpcmoe.report.record import RankRecord


class Flags(NamedTuple):
    """What leaders tell beside the counts: work is left, requests finished, tokens made, experts can change seats
    (Rebalancer.ready); a sum over leaders on arrival."""

    alive: int
    done: int
    tokens: int
    ready: int


class Exchange(ABC):
    """The rows of one stage's MoE layers, on one rank: own rows, rows of other leaders, rows for its experts.

    channels: one per lane. Every op of a micro-batch is over before its next one is called.
    """

    def __init__(self, world: World, compute: Compute, channels: list[Channel], record: RankRecord, router: RouterConfig):
        self.world, self.compute, self.channels, self.record = world, compute, channels, record
        self.device, self.leads = compute.device, world.leader is not None
        self.me, self.size = world.here.place, world.layout.ep
        self.experts = len(record.slots)  # behind the gate, every slot is an expert of its own
        self.owner_e = np.array(world.layout.owner_of_slot(router.experts))
        first_expert_r = np.searchsorted(self.owner_e, np.arange(self.size))
        self.column_e = np.arange(len(self.owner_e)) - first_expert_r[self.owner_e]
        self.most_experts = max(1, int(np.bincount(self.owner_e, minlength=self.size).max()))
        self.send_row, self.back_row = exchange.row_type(compute.send_width), exchange.row_type(compute.back_width)

    def channel(self, op: Op) -> Channel:
        return self.channels[op.micro % len(self.channels)]

    @abstractmethod
    def counts(self, op: Op, routed: Pending | None, flags: Callable[[], Flags]) -> Handle:
        """Tells each place how many rows of each of its experts will come.

        routed: the gate's result on a leader; flags: called when it is there, on every rank.
        """

    @abstractmethod
    def arrived(self, op: Op) -> tuple[np.ndarray, Flags]:
        """What COUNTS brought: rows of each of this rank's experts by sender, int64 [r, e], and the sum of the flags."""

    @abstractmethod
    def dispatch(self, op: Op) -> tuple[Any, Handle | None]:
        """(x_id, what fills it): rows to the ranks that own their experts."""

    @abstractmethod
    def combine(self, op: Op, y_id) -> Handle | None:
        """The experts' rows back to the leaders that `dispatch` got them from."""

    @abstractmethod
    def merge(self, op: Op) -> None:
        """Adds the weighted rows that `combine` brought to the leader's rows."""

    def close(self) -> None:
        """Gives back what is MPI's; collective."""


class Flight:
    """One micro-batch's rows on their way through a layer."""

    n_send_e: Any = None
    counts_in: Any = None
    n_recv_re: Any = None
    plan: Plan
    y_sd: Any = None


class FlatExchange(Exchange):
    """One message from each leader to each place that has rows of it, by the transport that was chosen."""

    def __init__(self, world: World, compute: Compute, channels: list[Channel], record: RankRecord, router: RouterConfig, sizes: Sizes):
        super().__init__(world, compute, channels, record, router)
        self.transport = exchange.TRANSPORTS[world.transport]
        self.away_r = np.array(world.node_r) != world.node_r[self.me]
        self.flights = [Flight() for _ in range(sizes.micros)]

    def counts(self, op: Op, routed: Pending | None, flags: Callable[[], Flags]) -> Handle:
        flight = self.flights[op.micro]
        out = np.zeros((self.size, self.most_experts + len(Flags._fields)), dtype=np.int32)
        flight.counts_in = out if self.size == 1 else np.empty_like(out)

        def post() -> list:
            if routed is not None:
                flight.n_send_e, = routed.read()
                out[self.owner_e, self.column_e] = flight.n_send_e
            out[:, self.most_experts:] = flags()
            if self.size == 1:
                return []
            away = int(self.away_r.sum())
            self.record.count(op, self.size - 1 - away, away, out[0].nbytes)
            return [self.channel(op).comm.Ialltoall(out, flight.counts_in)]

        event = routed.event if routed is not None else self.device.event().record()
        return Handle(post, (out, flight.counts_in), after=event)

    def arrived(self, op: Op) -> tuple[np.ndarray, Flags]:
        flight = self.flights[op.micro]
        flight.n_recv_re = flight.counts_in[:, :self.experts].astype(np.int64)
        return flight.n_recv_re, Flags(*map(int, flight.counts_in[:, self.most_experts:].sum(axis=0)))

    def dispatch(self, op: Op) -> tuple[Any, Handle | None]:
        """Rows to the ranks that own their experts: s -> i."""
        flight = self.flights[op.micro]
        n_recv_r = flight.n_recv_re.sum(axis=1)
        x_sd = self.compute.outgoing(op.micro) if self.leads else self.compute.incoming(op.micro, 0)
        if self.size == 1:
            self.record.count(op, own=len(x_sd))
            return x_sd, None
        n_send_r = np.zeros(self.size, dtype=np.int64)
        if self.leads:
            n_send_r = np.bincount(self.owner_e, weights=flight.n_send_e, minlength=self.size).astype(np.int64)
        flight.plan = Plan.of(n_send_r, n_recv_r, self.me)
        x_id = self.compute.incoming(op.micro, int(n_recv_r.sum()))
        return x_id, self._move(op, x_sd, x_id, flight.plan, int(n_send_r[self.me]), self.send_row)

    def combine(self, op: Op, y_id) -> Handle | None:
        """Rows back to the leaders they came from: i -> s."""
        flight = self.flights[op.micro]
        if self.size == 1:
            flight.y_sd = y_id
            self.record.count(op, own=len(y_id))
            return None
        n_send = int(flight.n_send_e.sum()) if self.leads else 0
        flight.y_sd = self.compute.returning(op.micro, n_send)
        own = int(flight.n_recv_re[self.me].sum())
        return self._move(op, y_id, flight.y_sd, flight.plan.back(), own, self.back_row)

    def _move(self, op: Op, send, recv, plan: Plan, own: int, row) -> Handle:
        """Posts the rows to others; the own ones are copied here."""
        a, b = int(plan.first_send_r[self.me]), int(plan.first_recv_r[self.me])
        if own:
            self.device.copy(recv[b:b + own], send[a:a + own])
        away = int(plan.n_send_r[self.away_r].sum())
        self.record.count(op, int(plan.n_send_r.sum()) - away, away, row.Get_size(), own)
        return self.transport(self.channel(op), send, recv, plan, row)

    def merge(self, op: Op) -> None:
        self.compute.merge(op.micro, self.flights[op.micro].y_sd)
