"""A schedule executed by a clock: the engine's loop (parallel/engine.py), with durations in place of work and a wire in place of MPI.

A *crew* are the ranks of one role: they run one program, and each has a clock of its own (arrays over the crew's ranks). What a rank
posts is ready when its host, and the device's work that made it, are done. An exchange begins when all ranks that take part have posted it;
its bytes share links with whatever else is on its way (cluster/fair.py), and it is over one latency after its last byte. As in the
engine an op is posted where it stands and awaited where it is needed.

Ranks that share the cores of a node are crews of one each: what they do is a job on these cores (cores.py), and takes as long as its
share of them says; where they are more than the cores, a rank that waits looks a few times, which is such a job too, and then only now and
then (parallel/polling.py).

Nothing comes too late: crews run until each waits for an exchange that is not over; the earliest begin or end among exchanges
is then the next thing to happen anywhere, since whatever is posted from now on is posted after it.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import Callable, Hashable, NamedTuple, Sequence

import numpy as np

from hpcmoe.cluster.fair import Wire
from hpcmoe.parallel.ops import Op, Step
from hpcmoe.parallel.polling import YIELDS, woken_s
from hpcmoe.parallel.schedule import Role
from hpcmoe.simulate.cores import Cores


class Leg(NamedTuple):
    """Bytes on each link (None: on none), what passes after the last of them, and for how many it shares links (Wire.start)."""

    load_l: np.ndarray | None
    latency_s: float
    messages: float = 1.0


class Flight(NamedTuple):
    """What an op leaves in flight. key: the same on all crews that take part in an exchange (None: the device's work alone is awaited);
    crews: how many they are; legs: what travels, one after the other."""

    key: Hashable
    crews: int = 1
    legs: tuple[Leg, ...] = ()


class Doing(NamedTuple):
    """One op of one round on a crew: seconds of host, of posting messages (host too), and of device (None: it has nothing to do),
    numbers or arrays over the ranks; waits_on: an exchange that others begin, which this op's result is (RECV)."""

    host_s: float | np.ndarray = 0.0
    post_s: float = 0.0
    device_s: float | np.ndarray | None = None
    flight: Flight | None = None
    waits_on: Hashable = None


class Stretch(NamedTuple):
    """A Span of all ranks of a crew (report/record.py): start_s, end_s are arrays."""

    op: Op
    round: int
    start_s: np.ndarray
    end_s: np.ndarray
    wait: bool
    device: bool


class Crew:
    """The ranks of one role. group: of replicas that are alike; program: the role's steps; doing(round, op): what an op is.

    busy_s, wait_s, post_s, device_s: by kind, arrays over the ranks. begun: when (round, op) began, for the ops in `watched`.
    weight_r: for how many rounds like it each round stands, where others are left out (None: for itself). All times but `now` and those of
    stretches are then as if none were: left_out_s of them have not passed. node: whose cores its only rank shares (None: every rank has its own).
    """

    def __init__(self, group: int, role: Role, ranks: int, program: tuple[Step, ...], rounds: int, doing: Callable[[int, Op], Doing],
                 sync_s: float = 0.0, trace: bool = False, watched: frozenset[Op] = frozenset(), weight_r: Sequence[float] | None = None,
                 node: int | None = None):
        self.group, self.role, self.program, self.rounds, self.doing = group, role, program, rounds, doing
        self.sync_s, self.trace, self.watched, self.node = sync_s, trace, watched, node
        self.job: tuple[Op, Doing, np.ndarray] | None = None  # on shared cores: what it is at, and since when
        self.looking = 0         # number of the event that begins its looks, while it waits
        self.asleep_s = -1.0     # since when it looks with pauses
        self.now, self.device = np.zeros(ranks), np.zeros(ranks)
        self.made: dict[int, np.ndarray] = {}  # by micro-batch: when the device's last work on it is done
        self.round = self.at = self.need = 0
        self.pending: dict[Op, tuple[int, Flight | Hashable, np.ndarray]] = {}
        self.busy_s, self.wait_s, self.post_s, self.device_s = ({} for _ in range(4))
        self.stretches: list[Stretch] = []
        self.begun: dict[tuple[int, Op], np.ndarray] = {}
        self.weight_r, self.round_s, self.left_out_s = weight_r, 0.0, 0.0

    def next_round(self) -> None:
        if self.weight_r is not None:
            self.left_out_s = self.left_out_s + (self.weight_r[self.round] - 1) * (self.now - self.round_s)
            self.round_s = self.now
        self.round, self.at = self.round + 1, 0

    def _add(self, table: dict, kind: str, seconds) -> None:
        if self.weight_r is not None and self.round < self.rounds:
            seconds = seconds * self.weight_r[self.round]
        table[kind] = table.get(kind, 0.0) + seconds

    def _note(self, op: Op, start, end, wait: bool, device: bool = False) -> None:
        if not device:
            self._add(self.wait_s if wait else self.busy_s, op.kind, end - start)
        if self.trace:
            self.stretches.append(Stretch(op, self.round, start, end, wait, device))

    @classmethod
    def joined(cls, crews: list[Crew]) -> Crew:
        """Crews of one rank each, which have run the same program, as one."""
        first = crews[0]
        made = cls(first.group, first.role, len(crews), first.program, first.rounds, first.doing, first.sync_s, first.trace, first.watched,
                   first.weight_r)
        made.now, made.round = np.concatenate([crew.now for crew in crews]), first.round
        made.left_out_s = np.concatenate([np.broadcast_to(crew.left_out_s, 1) for crew in crews])
        for name in ("busy_s", "wait_s", "post_s", "device_s", "begun"):
            tables = [getattr(crew, name) for crew in crews]
            setattr(made, name, {key: np.concatenate([np.broadcast_to(table.get(key, 0.0), 1) for table in tables])
                                 for key in dict.fromkeys(key for table in tables for key in table)})
        made.stretches = [parts[0]._replace(start_s=np.concatenate([p.start_s for p in parts]), end_s=np.concatenate([p.end_s for p in parts]))
                          for parts in zip(*(crew.stretches for crew in crews))]
        return made


class Clock:
    """All crews, the wire between them, and the cores that they share, if they do. bandwidth_l: bytes/s of every link."""

    def __init__(self, crews: list[Crew], bandwidth_l: np.ndarray, cores: Cores | None = None):
        self.crews, self.wire, self.cores = crews, Wire(bandwidth_l), cores or Cores([])
        self.posts: dict[Hashable, tuple[int, float]] = {}  # of exchanges that not all have posted: how many have, when the last did
        self.over_s: dict[Hashable, float] = {}
        self.legs: dict[Hashable, tuple[Leg, ...]] = {}  # of exchanges on their way, those that are left
        self.starting: list[tuple[float, int, Hashable]] = []  # exchanges, and crews with a job
        self.waiting: dict[Hashable, list[Crew]] = {}
        self.runnable = deque(crews)
        self.number, self.now = 0, 0.0

    def run(self) -> None:
        """Until every crew has done its rounds. Raises ValueError for a schedule that does not come to its end."""
        while True:
            while self.runnable:
                self._advance(self.runnable.popleft())
            if not self._happen():
                break
        if any(crew.round < crew.rounds or crew.pending for crew in self.crews):
            raise ValueError("the schedule does not end")

    # ------------------------------------------------------------ a crew
    def _advance(self, crew: Crew) -> None:
        """Runs a crew until it waits for an exchange that is not over, or ends."""
        while crew.round < crew.rounds:
            step = crew.program[crew.at]
            while crew.need < len(step.needs):
                if not self._await(crew, step.needs[crew.need]):
                    return
                crew.need += 1
            if crew.node is not None:
                self._begin_job(crew, step.op)
                return
            doing = crew.doing(crew.round, step.op)
            self._done(crew, step.op, doing, crew.now, crew.now + (doing.host_s + doing.post_s))
        while crew.pending:
            if not self._await(crew, next(iter(crew.pending))):
                return

    def _await(self, crew: Crew, need: Op) -> bool:
        """Whether a needed op's result is there; if so the crew has waited for it."""
        found = crew.pending.get(need)
        if found is None:
            return True
        key, ready = found
        if key is not None:
            if key not in self.over_s:
                self.waiting.setdefault(key, []).append(crew)
                if self._crowded(crew):
                    crew.looking, crew.asleep_s = self._start(crew), -1.0
                return False
            ready = self.over_s[key]
        del crew.pending[need]
        end = np.maximum(crew.now, ready)
        if crew.looking:
            if crew.asleep_s >= 0:
                end = np.array([woken_s(crew.asleep_s, float(end[0]))])
            else:
                self.cores.drop(self.now, crew.node, crew)
            crew.looking = 0
        crew._note(need, crew.now, end, True)
        crew.now = end
        return True

    def _begin_job(self, crew: Crew, op: Op) -> None:
        """An op on shared cores: it ends when these have had the time for it."""
        crew.job = op, crew.doing(crew.round, op), crew.now
        self._start(crew)

    def _start(self, crew: Crew) -> int:
        """What a crew does on shared cores next begins when it has come so far; the number of that event."""
        self.number += 1
        heapq.heappush(self.starting, (float(crew.now[0]), self.number, crew))
        return self.number

    def _crowded(self, crew: Crew) -> bool:
        return crew.node is not None and self.cores.machines[crew.node].crowded

    def _done(self, crew: Crew, op: Op, doing: Doing, start: np.ndarray, end: np.ndarray) -> None:
        """An op is done by its host; the crew goes on to the next one."""
        if op in crew.watched:
            crew.begun[crew.round, op] = start + crew.left_out_s
        crew._note(op, start, end, False)
        if doing.post_s:
            crew._add(crew.post_s, op.kind, doing.post_s)
        crew.now = end
        if doing.device_s is not None:
            begin = np.maximum(crew.device, end)
            crew.device = crew.made[op.micro] = begin + doing.device_s
            crew._add(crew.device_s, op.kind, doing.device_s)
            crew._note(op, begin, crew.device, False, True)
        if doing.flight is not None:
            ready = end if op.micro not in crew.made else np.maximum(end, crew.made[op.micro] + crew.sync_s)
            crew.pending[op] = (doing.flight.key, ready)
            if doing.flight.key is not None:
                self._post(doing.flight, float(ready.max()))
        elif doing.waits_on is not None:
            crew.pending[op] = (doing.waits_on, None)
        crew.need, crew.at = 0, crew.at + 1
        if crew.at == len(crew.program):
            crew.next_round()

    # ------------------------------------------------------------ exchanges
    def _post(self, flight: Flight, ready: float) -> None:
        count, last = self.posts.pop(flight.key, (0, 0.0))
        count, last = count + 1, max(last, ready)
        if count < flight.crews:
            self.posts[flight.key] = (count, last)
        else:
            self.legs[flight.key] = flight.legs
            self._next_leg(flight.key, last)

    def _next_leg(self, key: Hashable, now: float) -> None:
        """The next leg of an exchange that takes time on links is to start, or the exchange is over."""
        while self.legs[key]:
            leg = self.legs[key][0]
            if leg.load_l is not None:
                self.number += 1
                heapq.heappush(self.starting, (now, self.number, key))
                return
            self.legs[key], now = self.legs[key][1:], now + leg.latency_s
        del self.legs[key]
        self.over_s[key] = now
        self.runnable.extend(self.waiting.pop(key, []))

    def _happen(self) -> bool:
        """The next begin or end of an exchange, or of a job on shared cores; False where there is none."""
        due, job = self.wire.next_end(), self.cores.next_end()
        start_s = self.starting[0][0] if self.starting else math.inf
        if due is not None and due[0] <= min(start_s, job[0] if job else math.inf):
            self.now, key = due
            self.wire.end(key)
            leg, *self.legs[key] = self.legs[key]
            self._next_leg(key, self.now + leg.latency_s)
        elif job is not None and job[0] <= start_s:
            self.now = job[0]
            self._job_done(self.cores.end(*job))
        elif self.starting:
            self.now, number, key = heapq.heappop(self.starting)
            if isinstance(key, Crew):
                self._job_begins(key, number)
            else:
                leg = self.legs[key][0]
                self.wire.start(self.now, key, leg.load_l, leg.messages)
        else:
            return False
        return True

    # ------------------------------------------------------------ jobs on shared cores
    def _job_begins(self, crew: Crew, number: int) -> None:
        """An op, or a waiting rank's first looks, unless it has stopped waiting."""
        if crew.job:
            doing = crew.job[1]
            self.cores.start(self.now, crew.node, float(np.ravel(doing.host_s + doing.post_s)[0]), crew)
        elif crew.looking == number:
            self.cores.start(self.now, crew.node, YIELDS * self.cores.machines[crew.node].look_s, crew)

    def _job_done(self, crew: Crew) -> None:
        """An op is done and the crew goes on; or it has looked often enough, and from now on pauses."""
        if crew.job:
            (op, doing, start), crew.job = crew.job, None
            self._done(crew, op, doing, start, np.array([self.now]))
            self.runnable.append(crew)
        else:
            crew.asleep_s = self.now
