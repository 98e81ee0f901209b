"""Rebalancing: while a job runs, the load of experts is looked at now and then, and copies take other seats where that pays.

Every K-th round the places of a stage tell each other what their experts got since the last look, and the one that got
least decides for all (moves.py): it waits for the others anyway. Then, one layer at a time, weights go from rank to rank in chunks, on a communicator of their own: the engine
drives that between ops and while it waits for something else, and awaits it never but at the end. When a rank has all that it
lacks it enters a barrier. The first leader tells with the counts of its rows (Flags.ready) when it has left that: its round's
counts reach all ranks in the same round, so all take the new seats when it ends. Within a round, gate and experts
use one table; what is under way from before carries its own route.

With tensor shards, the ranks of one shard are a stage of their own here: what they sum does not depend on seats.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, Iterator

import numpy as np
from mpi4py import MPI

from hpcmoe.compute.base import Compute
from hpcmoe.compute.holdings import Share
from hpcmoe.config import RunJob
from hpcmoe.errors import UserError
from hpcmoe.parallel import exchange
from hpcmoe.parallel.handle import NOTHING, Chain, Handle, Together, Waiter
from hpcmoe.parallel.moves import Move, Price, Transfer, decide, transfers
from hpcmoe.parallel.world import World
from hpcmoe.report.record import RankRecord, Rebalancing, Seated

CHUNK = 4 << 20  # bytes of one message
FIGURES = 4      # of a decision, before its seats


@dataclass
class Window:
    """The rounds [first, ...) since the last look: this rank's rows by [layer, expert], whatever slots these were in; and what
    its experts had done when they began."""

    first: int
    rows_le: np.ndarray
    expert_s: float
    expert_rows: int


class Breath(Handle):
    """Over when it is asked again: what is driven beside the program lets that go on first."""

    asked = False

    def test(self) -> bool:
        self.over, self.asked = self.asked, True
        return self.over


class Rebalancer:
    """One rank's part.

    held: this rank's experts and spare ones (Holdings, GpuHoldings); compute: told when a layer's seats change; share: what
    sits where at first; experts: of a layer. ready: whether this rank, the first leader, knows that all have what they
    need. Collective over the stage. Raises UserError where ranks do not keep weights in the same way.
    """

    def __init__(self, world: World, held, compute: Compute, share: Share, experts: int, run: RunJob, record: RankRecord,
                 wait: Waiter, clock: Callable[[], float]):
        self.comm, self.held, self.compute, self.record, self.clock = world.moving, held, compute, record, clock
        self.channel, self.direct = exchange.Channel(world.moving, compute.device, compute.device.lane()), world.direct
        self.every, self.expert_ls = run.rebalance_every, share.expert_ls[record.layers]
        layout, self.node_r = world.layout, world.node_r
        self.experts = experts
        self.slots_of_place = np.array([len(layout.slots_of(r, experts)) for r in range(layout.ep)])
        self.me, self.first_leader = world.here.place, world.leader == 0
        self.expert_bytes = sum(part.nbytes for part in held.spares[0].weights())
        self._check_alike()
        self.move_s = self.expert_bytes / (run.rebalance_gb_per_s * 1e9) if run.rebalance_gb_per_s else self._measure(wait)
        self.handle: Handle = NOTHING
        self.busy = self.ready = False
        self.search_s = 0.0  # of looking for a layer's seating, here and of late
        self.todo: list[Move] = []
        self.arrived: list = []
        self.entry: Rebalancing | None = None
        self.window = self._begin(0)

    def _begin(self, round_: int) -> Window:
        return Window(round_, np.zeros((len(self.record.layers), self.experts)), self.record.work_s("EXPERT"),
                      self.record.expert_rows)

    # ------------------------------------------------------------ before the run
    def _check_alike(self) -> None:
        """Weights can be handed on as they are where all keep them in the same way."""
        if len(set(self.comm.allgather(self.held.spares[0].layout()))) > 1:
            raise UserError("run.rebalance_every: the ranks of a stage keep weights in different layouts (other CPUs, or another version "
                            "of oneDNN): expected 0, or weights.backend = numpy")

    def _measure(self, wait: Waiter) -> float:
        """Seconds of one expert's weights, all places sending to the next one at once: the quicker of two turns."""
        places, spare, seconds = self.comm.size, self.held.spares[0].weights(), []
        own = next(iter(self.held.experts.values())).weights()
        ring = [Transfer(0, r, (r + 1) % places) for r in range(places)]
        for _ in range(2):
            self.comm.Barrier()
            start = time.monotonic()
            wait(Chain(self._send(ring, lambda t: own, lambda t: spare)), "rebalancing: trial of moving weights")
            seconds.append(time.monotonic() - start)
        return min(self.comm.allreduce(s, MPI.MAX) for s in seconds)

    # ------------------------------------------------------------ between rounds
    def after_round(self, round_: int, load_ls: np.ndarray, agreed: bool, alive: bool) -> None:
        """Takes new seats if this round's counts said so, and looks at the load when it is time.

        load_ls: rows of this rank's slots in the round; agreed: whether the first leader was ready in it.
        """
        for rows_e, expert_s, load_s in zip(self.window.rows_le, self.expert_ls, load_ls):
            np.add.at(rows_e, expert_s[self.record.slots], load_s)
        if agreed:
            self._take_seats(round_)
            self._go_on(alive)
        elif alive and not self.busy and (round_ + 1) % self.every == 0:
            self.busy = True
            self.handle = Chain(self._look(round_))

    def _go_on(self, alive: bool) -> None:
        """The next layer's weights, if there are any to move."""
        self.busy = bool(self.todo) and alive
        self.handle = Chain(self._move()) if self.busy else NOTHING

    def _look(self, round_: int) -> Iterator[Handle]:
        """Tells and hears the load; decides, or hears what is decided; moves the first layer."""
        window = self.window
        self.window = self._begin(round_ + 1)
        work = self.window.expert_s - window.expert_s, self.window.expert_rows - window.expert_rows
        mine = np.concatenate([window.rows_le.reshape(-1), work])
        every = np.empty((self.comm.size, len(mine)))
        yield Handle(lambda: [self.comm.Iallgather(mine, every)], (mine, every))
        *rows_le, seconds, rows = every.sum(axis=0)
        decider = int(every[:, :-2].sum(axis=1).argmin())
        decided = np.zeros((len(self.record.layers), FIGURES + self.expert_ls.shape[1]))
        if self.me == decider:
            yield from self._decide(decided, np.reshape(rows_le, window.rows_le.shape), seconds / rows if rows else 0.0,
                                    self.every / (round_ + 1 - window.first))
        yield Handle(lambda: [self.comm.Ibcast(decided, decider)], (decided,))
        self.todo = self._moves(decided)
        self.looked = (window.first, round_ + 1)
        yield from self._move()

    def _decide(self, decided: np.ndarray, rows_le: np.ndarray, row_s: float, interval: float) -> Iterator[Handle]:
        """Fills in the new seats of layers and the decision's figures, a layer at a time; where none pays, zeros stay."""
        for row, layer, old_s, load_e in zip(decided, self.record.layers, self.expert_ls, rows_le):
            start = time.monotonic()
            move = decide(layer, old_s, load_e, self.slots_of_place, self.node_r, Price(row_s, self.move_s, self.search_s), interval)
            self.search_s = max(self.search_s / 2, time.monotonic() - start)  # one slow search is not held against it for ever
            if move is not None:
                row[:] = move.gain_s, move.cost_s, *move.heaviest, *move.new_s
            yield Breath()

    def _moves(self, decided: np.ndarray) -> list[Move]:
        """What `_decide` has filled in, the most profitable first."""
        found = []
        for layer, old_s, (gain_s, cost_s, before, after, *new_s) in zip(self.record.layers, self.expert_ls, decided):
            if gain_s > 0:
                new_s = np.array(new_s, dtype=np.int64)
                found.append(Move(layer, new_s, transfers(old_s, new_s, self.slots_of_place, self.node_r), (before, after), gain_s, cost_s))
        return sorted(found, key=lambda move: (-move.gain_s, move.layer))

    def _move(self) -> Iterator[Handle]:
        """The weights of the next move; over when all ranks have theirs. Without one: over when all ranks know that there is none."""
        self.arrived = []
        if self.todo:
            move, spares = self.todo[0], list(self.held.spares)
            incoming = {t: spares.pop() for t in move.transfers if t.target == self.me}
            self.arrived = [(t.expert, expert) for t, expert in incoming.items()]
            self._list(move)
            yield from self._send(move.transfers, lambda t: self._weights(move.layer, t.expert), lambda t: incoming[t].weights())
        yield Handle(lambda: [self.comm.Ibarrier()])
        self.ready = self.first_leader

    def _weights(self, layer: int, expert: int) -> list:
        own_s = self._own(self.expert_ls[self.record.layers.index(layer)])
        return self.held.experts[layer, self.record.slots[own_s.index(expert)]].weights()

    def _own(self, expert_s) -> list[int]:
        """Of a layer's slots, what is in this rank's."""
        return [int(expert_s[s]) for s in self.record.slots]

    def _send(self, transfers: list[Transfer], outgoing: Callable, incoming: Callable) -> Iterator[Handle]:
        """Weights from sources to targets, a chunk of each after the other: all experts have the same size, so that all
        ranks take the same steps. outgoing, incoming: the bytes of a transfer here, as source and as target."""
        mine = [(i, t, outgoing(t) if t.source == self.me else incoming(t)) for i, t in enumerate(transfers) if self.me in (t.source, t.target)]
        chunks = [_chunks(parts) for _, _, parts in mine]
        self._after_compute()
        for step in range(max(map(len, chunks), default=0)):
            with self.channel.lane:
                handles = [self._pass(i, t, chunk[step]) for (i, t, _), chunk in zip(mine, chunks)]
            yield Together(*handles)
        with self.channel.lane:
            arrived = self.compute.device.event().record()
        yield Handle(after=arrived)

    def _after_compute(self) -> None:
        """What a device has queued so far may read what is a spare by now, or write nothing that travels."""
        for lane in self.compute.lanes:
            with lane:
                queued = self.compute.device.event().record()
            self.channel.lane.after(queued)

    def _pass(self, tag: int, transfer: Transfer, chunk) -> Handle:
        if transfer.source == self.me:
            return exchange.send_rows(self.channel, self.comm, chunk, transfer.target, tag, self.direct)
        return exchange.recv_rows(self.channel, self.comm, chunk, transfer.source, tag, self.direct)

    # ------------------------------------------------------------ new seats
    def _take_seats(self, round_: int) -> None:
        self.ready = False
        if not self.todo:
            return
        move, held = self.todo.pop(0), self.held
        index = self.record.layers.index(move.layer)
        old, new = (self._own(seats) for seats in (self.expert_ls[index], move.new_s))
        seats, free = seat_experts(old, new, [held.experts[move.layer, slot] for slot in self.record.slots], self.arrived)
        arrived = [expert for _, expert in self.arrived]
        held.spares = [s for s in held.spares if s not in arrived] + free
        self.expert_ls[index] = move.new_s
        held.experts |= {(move.layer, slot): expert for slot, expert in zip(self.record.slots, seats)}
        self.compute.seat(move.layer, move.new_s)
        self.record.seated.append(Seated(round_ + 1, self.expert_ls[:, self.record.slots].copy()))
        if self.entry is not None:
            self.entry.switch_round, self.entry.switched_s = round_ + 1, self.clock()

    def _list(self, move: Move) -> None:
        """One rank of the stage keeps the list."""
        if self.me == 0:
            self.entry = Rebalancing(move.layer, *self.looked, self.clock(), len(move.transfers), len(move.transfers) * self.expert_bytes,
                                     *move.heaviest, move.gain_s, move.cost_s)
            self.record.rebalancings.append(self.entry)


def seat_experts(old: list[int], new: list[int], held: list, arrived: list[tuple]) -> tuple[list, list]:
    """(the objects in a place's slots, those that no slot needs any more).

    old, new: the expert in each slot; held: the object in each slot; arrived: (expert, object) of those that came.
    A slot whose expert stays keeps its object; an expert that only this place has may sit in two slots with one object.
    """
    seats: list = [h if a == b else None for a, b, h in zip(old, new, held)]
    free = [(a, h) for a, h, seat in zip(old, held, seats) if seat is None] + list(arrived)
    for i, e in enumerate(new):
        if seats[i] is None:
            at = next((j for j, (other, _) in enumerate(free) if other == e), None)
            seats[i] = free.pop(at)[1] if at is not None else next(h for h, other in zip(seats, new) if other == e and h is not None)
    used = set(map(id, seats))
    return seats, list({id(h): h for _, h in free if id(h) not in used}.values())


def _chunks(parts: list) -> list:
    return [part[a:a + CHUNK] for part in parts for a in range(0, len(part), CHUNK)]
