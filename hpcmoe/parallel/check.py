"""Proof, before MPI is touched, that a schedule is consistent and ends.

A schedule is executed on paper for two rounds: an op completes when what it needs has completed, a
collective when all roles of the stage posted it, a RECV when its SEND (or the last round's SAMPLE) was posted.
"""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest

from hpcmoe.parallel.ops import COLLECTIVES, Op
from hpcmoe.parallel.schedule import Role, Schedule

ROUNDS = 2
LETTERS = {"EMBED": "b", "ATTEND": "a", "REDUCE_ATTEND": "+", "GATE": "g", "COUNTS": "n", "DISPATCH": "d", "EXPERT": "e",
           "COMBINE": "c", "MERGE": "m", "REDUCE_MERGE": "*", "SEND": ">", "SAMPLE": "s"}


class ScheduleError(Exception):
    """An inconsistent schedule: a fault of its builder. The text holds the grid, the guilty op marked."""


def check(schedule: Schedule) -> None:
    """Raises ScheduleError unless order, matching and progress hold."""
    _check_once(schedule)
    _check_collectives(schedule)
    _check_messages(schedule)
    _check_progress(schedule)


def _fail(schedule: Schedule, role: Role, op: Op | None, why: str):
    raise ScheduleError(f"{role}: {op or ''}: {why}\n{grid(schedule, role, op)}")


def _check_once(schedule: Schedule) -> None:
    """Each op once per program; every needed op is in the program."""
    for role, program in schedule.programs.items():
        count = Counter(step.op for step in program)
        for step in program:
            if count[step.op] > 1:
                _fail(schedule, role, step.op, "stands more than once")
            for need in step.needs:
                if need not in count:
                    _fail(schedule, role, step.op, f"needs {need}, which is not in the program")


def _check_collectives(schedule: Schedule) -> None:
    """All ranks of a stage post the collectives of a lane in the same order."""
    for stage in range(schedule.stages):
        for lane in range(schedule.lanes):
            orders = [[s.op for s in schedule.programs[Role(stage, leader)]
                       if s.op.kind in COLLECTIVES and s.op.micro % schedule.lanes == lane] for leader in (True, False)]
            for mine, other in zip_longest(*orders):
                if mine != other:
                    _fail(schedule, Role(stage, False), other or mine, f"lane {lane}: the leaders post {mine or 'nothing'} here")


def _check_messages(schedule: Schedule) -> None:
    """Stages send what the next one receives, in the same order: one channel per pair of leaders."""
    for stage in range(schedule.stages):
        role, after = Role(stage, True), Role((stage + 1) % schedule.stages, True)
        kind = "SAMPLE" if stage == schedule.stages - 1 else "SEND"
        sent = [s.op for s in schedule.programs[role] if s.op.kind == kind]
        received = [s.op for s in schedule.programs[after] if s.op.kind == "RECV"]
        for mine, other in zip_longest(sent, received):
            if mine is None:
                _fail(schedule, after, other, f"nothing is sent by {role} for it")
            if other is None or mine.micro != other.micro:
                _fail(schedule, role, mine, f"{after} receives {other or 'nothing'} here")


def _check_progress(schedule: Schedule) -> None:
    """Runs all programs on paper; whoever cannot go on in the end is reported."""
    programs = {role: [(r, step) for r in range(ROUNDS) for step in program] for role, program in schedule.programs.items()}
    place = {role: {step.op: i for i, step in enumerate(program)} for role, program in schedule.programs.items()}
    done = {role: 0 for role in programs}
    posted: set[tuple[Role, int, Op]] = set()

    def complete(role: Role, rnd: int, op: Op) -> bool:
        if rnd < 0:
            return True
        if (role, rnd, op) not in posted:
            return False
        if op.kind in COLLECTIVES:
            return all((Role(role.stage, leader), rnd, op) in posted for leader in (True, False))
        if op.kind == "RECV":
            return _arrived(schedule, posted, role, rnd, op)
        return True

    moved = True
    while moved:
        moved = False
        for role, program in programs.items():
            while done[role] < len(program):
                rnd, (op, needs) = program[done[role]]
                here = place[role][op]
                if not all(complete(role, rnd - (place[role][n] >= here), n) for n in needs):
                    break
                posted.add((role, rnd, op))
                done[role] += 1
                moved = True
    for role, program in programs.items():
        if done[role] < len(program):
            rnd, (op, needs) = program[done[role]]
            _fail(schedule, role, op, f"waits for ever for {' '.join(map(str, needs))} in round {rnd}")


def _arrived(schedule: Schedule, posted: set, role: Role, rnd: int, op: Op) -> bool:
    """Has the message of a RECV been sent? Stage 0 receives the tokens sampled in the round before."""
    if role.stage:
        before = schedule.layers_of(role.stage - 1)
        return (Role(role.stage - 1, True), rnd, Op("SEND", before[-1], op.micro)) in posted
    last = schedule.stages - 1
    return rnd == 0 or (Role(last, True), rnd - 1, Op("SAMPLE", schedule.layers_of(last)[-1], op.micro)) in posted


def timeline(schedule: Schedule, rounds: int = 1) -> list[tuple[Role, int, int, Op]]:
    """When each leader op would run if every op took one tick: (role, round, tick, op)."""
    clock = {Role(s, True): 0 for s in range(schedule.stages)}
    ready: dict[tuple[Role, int, Op], int] = {}
    cells = []
    programs = {role: [(r, step) for r in range(rounds) for step in schedule.programs[role]] for role in clock}
    done = {role: 0 for role in clock}
    while any(done[role] < len(programs[role]) for role in clock):
        for role in clock:
            while done[role] < len(programs[role]):
                rnd, (op, needs) = programs[role][done[role]]
                tick = _start(schedule, ready, role, rnd, op, needs, clock[role])
                if tick is None:
                    break
                ready[role, rnd, op] = tick + (op.kind != "RECV")
                clock[role] = tick + (op.kind != "RECV")
                cells.append((role, rnd, tick, op))
                done[role] += 1
    return cells


def _start(schedule: Schedule, ready: dict, role: Role, rnd: int, op: Op, needs: tuple, now: int) -> int | None:
    """The tick at which an op can start, or None while what it needs is not known yet."""
    if needs and needs[0].kind == "RECV":
        if role.stage:
            source = (Role(role.stage - 1, True), rnd, Op("SEND", schedule.layers_of(role.stage - 1)[-1], op.micro))
        else:
            last = schedule.stages - 1
            source = (Role(last, True), rnd - 1, Op("SAMPLE", schedule.layers_of(last)[-1], op.micro))
        if source[1] < 0:
            return now
        return max(now, ready[source]) if source in ready else None
    return now


def grid(schedule: Schedule, guilty_role: Role | None = None, guilty: Op | None = None) -> str:
    """The programs as rows of cells, one row per role: K<layer>.<micro> with K the op's letter."""
    lines = [f"{schedule.name}: {schedule.micros} micro-batch(es), {schedule.lanes} lane(s); "
             "cells are kind, layer.micro-batch"]
    for role, program in schedule.programs.items():
        cells = []
        for step in program:
            cell = f"{step.op.kind[:4].lower()}{step.op.layer}.{step.op.micro}"
            cells.append(f">>{cell}<<" if (role, step.op) == (guilty_role, guilty) else cell)
        lines.append(f"{str(role):16s} " + " ".join(cells))
    return "\n".join(lines)


def draw(schedule: Schedule, cells: list) -> str:
    """The grid of a timeline: a row per stage, a column per tick, in each cell the op's first letter and micro-batch."""
    rows: dict[Role, dict[int, str]] = {}
    for role, _, tick, op in cells:
        if op.kind != "RECV":
            rows.setdefault(role, {})[tick] = f"{LETTERS[op.kind]}{op.micro}"
    width = max((len(cell) for row in rows.values() for cell in row.values()), default=2) + 1
    last = max((tick for row in rows.values() for tick in row), default=0)
    lines = [f"schedule {schedule.name}: {schedule.stages} stage(s), {schedule.layers} layers, {schedule.micros} "
             f"micro-batch(es), {schedule.lanes} lane(s); a column is one tick, a cell an op and its micro-batch",
             "  ".join(f"{letter}={kind}" for kind, letter in LETTERS.items() if any(op.kind == kind for *_, op in cells))]
    for role, row in rows.items():
        busy = len(row) / (last + 1)
        line = "".join(row.get(tick, ".").ljust(width) for tick in range(last + 1)).rstrip()
        lines.append(f"stage {role.stage} ({busy:4.0%} busy) {line}")
    return "\n".join(lines)
