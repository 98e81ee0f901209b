"""Messages in flight, and the wait for them."""

from __future__ import annotations

import math
import os
import time
from typing import Callable, Iterable, Iterator

from mpi4py import MPI

from hpcmoe.device import Event
from hpcmoe.doing import HERE
from hpcmoe.errors import Stalled
from hpcmoe.parallel.polling import YIELDS, pause_s

READY = Event()


class Handle:
    """Something in flight. `test()` drives it: once `after.done`, post() gives the requests; when all of
    those have arrived, finish() runs. Keeps `keep`, the buffers, alive. post_s: seconds that posting has taken so far.

    MPI knows nothing of streams: what reads a buffer that a GPU fills is posted after its event.
    """

    def __init__(self, post: Callable[[], list] | None = None, keep: tuple = (),
                 finish: Callable[[], None] | None = None, after: Event = READY):
        self.requests: list | None = None
        self.post_s = 0.0
        self.post, self.keep, self.finish, self.after = post, keep, finish, after
        self.over = False
        self.start()

    def start(self) -> bool:
        """Posts the messages if their event is done; whether they are posted now."""
        if self.requests is None and self.after.done:
            begin = time.monotonic()
            self.requests = self.post() if self.post else []
            self.post_s += time.monotonic() - begin
        return self.requests is not None

    def test(self) -> bool:
        """True once everything has arrived (and `finish` has run)."""
        if self.over:
            return True
        if not self.start() or (self.requests and not MPI.Request.Testall(self.requests)):
            return False
        self.over = True
        if self.finish:
            self.finish()
        return True

    @property
    def posted(self) -> bool:
        """Whether it waits for other ranks, not for this rank's device."""
        return self.requests is not None


NOTHING = Handle()  # has always arrived


class Chain(Handle):
    """Hops one after the other: a generator yields the handle of each hop, and goes on when that one is done.

    What a hop needs of the one before, its sizes for instance, is computed between two yields. The
    generator keeps the buffers of hops alive.
    """

    def __init__(self, hops: Iterator[Handle], keep: tuple = (), after: Event = READY):
        self.hops, self.hop = hops, None
        super().__init__(keep=keep, after=after)

    def start(self) -> bool:
        """Also goes on to the next hop where it can: others wait for what this rank hands on."""
        return self.test()

    def test(self) -> bool:
        if self.over or (self.hop is None and not self.after.done):
            return self.over
        while self.hop is None or self.hop.test():
            begin = time.monotonic()
            self.hop = next(self.hops, None)
            self.post_s += time.monotonic() - begin
            if self.hop is None:
                self.over = True
                break
        return self.over

    @property
    def posted(self) -> bool:
        return self.hop is not None and self.hop.posted


class Together(Handle):
    """Several handles as one; beside: handles that are driven meanwhile and need not be done."""

    def __init__(self, *handles: Handle, beside: tuple[Handle, ...] = ()):
        self.handles, self.beside = handles, beside
        super().__init__()

    def start(self) -> bool:
        return self.test()

    def test(self) -> bool:
        for handle in self.beside:
            handle.start()
        self.over = all([handle.test() for handle in self.handles])  # a list: each is driven
        return self.over

    @property
    def posted(self) -> bool:
        return any(handle.posted for handle in self.handles if not handle.over)


class Waiter:
    """Waits by polling, seen by the watch.

    crowded: more ranks than cores; then a waiting rank soon sleeps instead of burning the core
    that the rank it waits for needs. limit_s: for trials of what may hang.
    """

    def __init__(self, crowded: bool, limit_s: float = math.inf):
        self.crowded, self.limit_s = crowded, limit_s

    def __call__(self, handle: Handle, what: object, others: Iterable[Handle] = ()) -> None:
        """Returns when the handle is done; raises Stalled, naming `what`, after limit_s seconds.

        others: handles that are driven meanwhile.
        """
        if handle.test():
            return
        start, polls, HERE.wait = time.monotonic(), 0, (what, handle)
        while not handle.test():
            polls += 1
            for other in others:
                other.test()
            if self.crowded:
                os.sched_yield() if polls < YIELDS else time.sleep(pause_s(time.monotonic() - start))
            elif polls % 64 == 0:
                os.sched_yield()
            if polls % 256 == 0 and time.monotonic() - start > self.limit_s:
                HERE.wait = None
                raise Stalled(f"{what} made no progress for {self.limit_s:g} s")
        HERE.wait = None
