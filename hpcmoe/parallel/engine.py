"""The engine: executes a rank's program round after round, and times it."""

from __future__ import annotations

import os
import time
from typing import Callable

import numpy as np

from hpcmoe.doing import HERE
from hpcmoe.parallel.handle import NOTHING, Handle, Waiter
from hpcmoe.parallel.ops import Op, Step
from hpcmoe.report.record import RankRecord, Span


class Engine:
    """Runs a program until `more` says that no leader of the stage has work.

    program: this rank's steps; table: {kind: function of an op that returns a Handle or None};
    wait: how to await a handle; clock: seconds since the start of the run, aligned over ranks;
    failure_point: called with each round's number (failing.failure_point); aside: what goes on beside the program: driven
    between ops and in waits, awaited by no op, only at the end.
    """

    def __init__(self, program: tuple[Step, ...], table: dict[str, Callable[[Op], Handle | None]], wait: Waiter,
                 record: RankRecord, clock: Callable[[], float], trace: bool,
                 failure_point: Callable[[int], None], aside: Callable[[], Handle] = lambda: NOTHING):
        self.program, self.table, self.wait = program, table, wait
        self.record, self.clock, self.trace, self.failure_point = record, clock, trace, failure_point
        self.aside = aside
        self.pending: dict[Op, Handle] = {}
        self.round, self.at = 0, 0

    def run(self, more: Callable[[], bool], after_round: Callable[[int], None]) -> None:
        """Rounds until `more()` is false after one; `after_round(round)` is called after each."""
        start, HERE.position = self.clock(), self.position
        while True:
            self.failure_point(self.round)
            for self.at, step in enumerate(self.program):
                self._do(step)
            after_round(self.round)
            self.round, self.at = self.round + 1, 0
            if not more():
                break
        while self.pending:
            op = next(iter(self.pending))
            self._await(op, self.pending.pop(op))
        self.wait(self.aside(), f"rank {self.record.rank}, after round {self.round}: rebalancing")
        self.record.run_s = self.clock() - start

    def position(self) -> tuple[int, int, Op]:
        """(round, number of the step in the program, its op), for the watch."""
        return self.round, self.at, self.program[self.at].op

    def _do(self, step: Step) -> None:
        op = step.op
        for need in step.needs:
            handle = self.pending.pop(need, None)
            if handle is not None:
                self._await(need, handle)
        start = self.clock()
        handle = self.table[op.kind](op)
        self._note(op, start, False)
        if handle is not None:
            _add(self.record.post_s, op.kind, handle.post_s)
        for earlier, waiting in self.pending.items():  # what waited for the device, or for a hop, may have become ready to post
            start = self.clock()
            waiting.start()
            seconds = self.clock() - start
            _add(self.record.post_s, earlier.kind, seconds)
            _add(self.record.busy_s, earlier.kind, seconds)
        if handle is not None:
            self.pending[op] = handle
        self.aside().start()

    def _await(self, op: Op, handle: Handle) -> None:
        start = self.clock()
        self.wait(handle, op, [*self.pending.values(), self.aside()])
        self._note(op, start, True)

    def _note(self, op: Op, start: float, wait: bool) -> None:
        end = self.clock()
        _add(self.record.wait_s if wait else self.record.busy_s, op.kind, end - start)
        if self.trace:
            self.record.spans.append(Span(op.kind, op.layer, op.micro, self.round, start, end, wait))


def _add(seconds: dict[str, float], kind: str, more: float) -> None:
    seconds[kind] = seconds.get(kind, 0.0) + more


def aligned_clock(comm) -> Callable[[], float]:
    """Seconds since a common start, on a clock that agrees between ranks.

    Ranks of a node share CLOCK_MONOTONIC; across nodes an offset to rank 0 is estimated from the
    quickest of a few round trips (Cristian's algorithm, 1989).
    """
    names = comm.allgather(os.uname().nodename + _boot_id())
    offset = 0.0
    if len(set(names)) > 1:
        offset = _offset_to_root(comm, names)
    comm.Barrier()
    zero = comm.bcast(time.monotonic())
    return lambda: time.monotonic() + offset - zero


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _offset_to_root(comm, names: list[str], trips: int = 8) -> float:
    offset = 0.0
    stamp = np.zeros(1)
    for rank in range(1, comm.size):
        if names[rank] == names[0]:
            continue
        best = np.inf
        for _ in range(trips):
            if comm.rank == 0:
                comm.Recv(stamp, rank)
                comm.Send(np.array([time.monotonic()]), rank)
            elif comm.rank == rank:
                sent = time.monotonic()
                comm.Send(stamp, 0)
                comm.Recv(stamp, 0)
                back = time.monotonic()
                if back - sent < best:
                    best, offset = back - sent, stamp[0] - (sent + back) / 2
    return offset
