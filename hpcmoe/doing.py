"""What this process is about: written by its main thread at next to no cost, read by the watch (watch.py)."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterator, NamedTuple

from hpcmoe.config import RunJob

PHASES = ("at the start", "in set-up", "loading weights", "in a round", "at the end")
START, SET_UP, WEIGHTS, RUN, END = range(len(PHASES))
PACKAGE = os.path.dirname(__file__)


class Doing:
    """wait: (what, handle or None), a new pair each time, while the main thread waits for other ranks; question: such
    a pair for an answer that may come while it goes on; position: (round, step of the program, op) during a run;
    hosts: of each rank, as soon as they are known; stall_s: the deadline of the watch."""

    def __init__(self):
        self.wait: tuple[Any, Any] | None = None
        self.question: tuple[Any, Any] | None = None
        self.phase = START
        self.position: Callable[[], tuple[int, int, object]] = lambda: (0, 0, "")
        self.hosts: list[str] = []
        self.stall_s = RunJob.stall_s

    def host(self, rank: int) -> str:
        return self.hosts[rank] if rank < len(self.hosts) else "?"


HERE = Doing()


@contextmanager
def waits(what: str) -> Iterator[None]:
    """Round a call that returns when other ranks have done something."""
    before, HERE.wait = HERE.wait, (what, None)
    try:
        yield
    finally:
        HERE.wait = before


class Status(NamedTuple):
    """What a rank answers. order: what it does comes before what larger ones do; words: what it does; waits: for other
    ranks; quiet_s: since it began to wait, or, where it works, since it last used its core or went on to another op."""

    order: tuple[int, int, int]
    words: str
    waits: bool
    quiet_s: float


def status(quiet_s: float) -> Status:
    """Of this process, now; called by threads other than the main one."""
    wait, phase, (number, step, op) = HERE.wait, HERE.phase, HERE.position()
    where = f"in round {number}" if phase == RUN else PHASES[phase]
    there = wait is None or (wait[1] is not None and not wait[1].posted)  # a device of its own is what it waits for
    if wait is None:
        words = f"works on {op}" if phase == RUN else f"works{_functions()}"
    else:
        words = f"its device works on {wait[0]}" if there else f"waits for {wait[0]}{_functions() if wait[1] is None else ''}"
    return Status((phase, number, step), f"{where} {words}", not there, quiet_s)


def _functions(most: int = 3) -> str:
    """The functions of this package that the main thread is in, innermost first: " in f < g < h"."""
    frame, names = sys._current_frames().get(threading.main_thread().ident), []
    while frame is not None and len(names) < most:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE) and os.path.basename(code.co_filename) not in ("doing.py", "watched.py"):
            names.append(code.co_name)
        frame = frame.f_back
    return f" in {' < '.join(names)}" if names else ""
