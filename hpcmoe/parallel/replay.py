"""A schedule replayed as a clock: when every op would run, were its times known. No MPI, no arrays.

What a pipeline leaves idle follows from the schedule and the length of its ops alone: dependencies within a rank (Step.needs),
between stages (SEND to RECV, SAMPLE to the next round's RECV), and a stage's collectives, which are over when all have posted.
"""

from __future__ import annotations

from collections import Counter
from typing import Callable, NamedTuple

from hpcmoe.parallel.ops import COLLECTIVES, Op
from hpcmoe.parallel.schedule import Role, Schedule
from hpcmoe.report.record import RankRecord

PIPE_WAITS = ("RECV",)  # awaited while another stage works
MOST_STEPS = 20_000     # replayed for a report: a second at most


class Cost(NamedTuple):
    """Of one op: how long it keeps its rank; how long its messages travel once everyone concerned has posted it."""

    busy_s: float
    flight_s: float = 0.0


class Slot(NamedTuple):
    """One op of one round. From begin_s to start_s its rank waits for what the op needs, pipe_s of it for another stage; then
    the op keeps it until end_s."""

    role: Role
    round: int
    op: Op
    begin_s: float
    start_s: float
    end_s: float
    pipe_s: float


def replay(schedule: Schedule, cost: Callable[[Role, Op], Cost], rounds: int = 1, experts: bool = False) -> list[Slot]:
    """All ops of so many rounds, each rank's in order. experts: there are ranks that do not lead; else every rank is a leader.

    All ranks of a role do the same at the same time. A message counts as sent when its op ends and has travelled flight_s.
    Raises ValueError for a schedule that does not come to its end (check.py says why).
    """
    programs = {role: [(r, step) for r in range(rounds) for step in steps]
                for role, steps in schedule.programs.items() if role.leader or experts}
    clock = _Clock(schedule, cost, set(programs))
    done, slots, moved = dict.fromkeys(programs, 0), [], True
    while moved:
        moved = False
        for role, program in programs.items():
            while done[role] < len(program):
                slot = clock.next(role, *program[done[role]])
                if slot is None:
                    break
                slots.append(slot)
                done[role] += 1
                moved = True
    if any(done[role] < len(program) for role, program in programs.items()):
        raise ValueError("the schedule does not end")
    return slots


class _Clock:
    """now: how far each role is; posted: when an op of a round ended on a role."""

    def __init__(self, schedule: Schedule, cost: Callable[[Role, Op], Cost], roles: set[Role]):
        self.schedule, self.cost, self.roles = schedule, cost, roles
        self.place = {role: {step.op: i for i, step in enumerate(steps)} for role, steps in schedule.programs.items()}
        self.now = dict.fromkeys(roles, 0.0)
        self.posted: dict[tuple[Role, int, Op], float] = {}

    def next(self, role: Role, rnd: int, step) -> Slot | None:
        """The step's slot, or None while what it needs is not known yet."""
        op, begin, now, pipe = step.op, self.now[role], self.now[role], 0.0
        here = self.place[role][op]
        for need in step.needs:
            over = self._over(role, rnd - (self.place[role][need] >= here), need)
            if over is None:
                return None
            if need.kind in PIPE_WAITS:
                pipe += max(0.0, over - now)
            now = max(now, over)
        end = now + self.cost(role, op).busy_s
        self.now[role] = self.posted[role, rnd, op] = end
        return Slot(role, rnd, op, begin, now, end, pipe)

    def _over(self, role: Role, rnd: int, op: Op) -> float | None:
        """When the result of an op is there."""
        if rnd < 0:
            return 0.0
        posts = [self.posted.get((role, rnd, op))]
        if op.kind in COLLECTIVES:
            posts = [self.posted.get((r, rnd, op)) for r in self.roles if r.stage == role.stage]
        elif op.kind == "RECV":
            posts += self._sent(role, rnd, op)
        if None in posts:
            return None
        return max(posts) + (self.cost(role, op).flight_s if op.kind != "RECV" else 0.0)

    def _sent(self, role: Role, rnd: int, op: Op) -> list[float | None]:
        """When the message of a RECV has come: rows of the stage before, or on stage 0 the last round's tokens."""
        if role.stage:
            source, rnd, sent = Role(role.stage - 1, True), rnd, Op("SEND", self.schedule.layers_of(role.stage - 1)[-1], op.micro)
        else:
            last = self.schedule.stages - 1
            source, rnd, sent = Role(last, True), rnd - 1, Op("SAMPLE", self.schedule.layers_of(last)[-1], op.micro)
        if rnd < 0:
            return []
        end = self.posted.get((source, rnd, sent))
        return [None if end is None else end + self.cost(source, sent).flight_s]


def bubble_share(slots: list[Slot]) -> float | None:
    """The share of the whole time in which a leader had nothing of its stage to do or to wait for: it waited for another stage,
    or had ended. Mean over stages; None where nothing takes time."""
    total = max((slot.end_s for slot in slots), default=0.0)
    if not total:
        return None
    stages = {slot.role.stage for slot in slots}
    end = dict.fromkeys(stages, 0.0)
    idle = dict.fromkeys(stages, 0.0)
    for slot in slots:
        if slot.role.leader:
            idle[slot.role.stage] += slot.pipe_s
            end[slot.role.stage] = max(end[slot.role.stage], slot.end_s)
    return sum(idle[s] + total - end[s] for s in stages) / (total * len(stages))


def predicted_bubble(schedule: Schedule, records: list[RankRecord]) -> float | None:
    """`bubble_share` of a run's schedule, with the mean times that its leaders recorded per kind of op and stage, waits within the stage
    among them; what remains is what the pipeline alone leaves idle. Of as many rounds as had rows, but for long runs."""
    rounds = max((int(r.load.any(axis=(1, 2)).sum()) for r in records), default=0)
    if not rounds:
        return None
    mean = {}
    for stage in range(schedule.stages):
        role = Role(stage, True)
        leaders = [r for r in records if r.stage == stage and r.leader]
        for kind, count in Counter(step.op.kind for step in schedule.programs[role]).items():
            seconds = sum(r.busy_s.get(kind, 0.0) + (0.0 if kind in PIPE_WAITS else r.wait_s.get(kind, 0.0)) for r in leaders)
            mean[stage, kind] = Cost(seconds / (len(leaders) * rounds * count))
    steps = sum(len(p) for role, p in schedule.programs.items() if role.leader)
    return bubble_share(replay(schedule, lambda role, op: mean[role.stage, op.kind], min(rounds, max(2, MOST_STEPS // steps))))
