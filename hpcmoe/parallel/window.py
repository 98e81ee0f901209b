"""Rows between the ranks of one node: written straight into the receiver's memory where they share a window, else messages.

A source of rows is called with a part of them: it returns those, or writes them into host memory `out` where that is given.
"""

from __future__ import annotations

import os
from typing import Any, Callable

import numpy as np
from mpi4py import MPI

from hpcmoe.compute.relay import rows_as_bytes
from hpcmoe.doing import waits
from hpcmoe.parallel.exchange import Channel, Plan
from hpcmoe.parallel.handle import Handle

TAG_ROWS, TAG_THERE = 5, 6  # rows as a message; an empty message: rows are in the receiver's part
MOST_BYTES = 64 << 20  # of a part in one direction on one lane; pages that no row touches are not taken
LEAST_BYTES = 64 << 10
SHARED = "/dev/shm"  # where MPI libraries keep shared memory
EMPTY = np.zeros(0, dtype=np.uint8)


class Window:
    """A window of MPI_Win_allocate_shared (MPI 4.1, section 12.2.3) with a part for each rank of `comm`.

    size: bytes of a direction of a lane, the same on all ranks of comm.
    """

    def __init__(self, comm, lanes: int, size: int):
        self.size = size
        info = MPI.Info.Create({"alloc_shared_noncontig": "true"})  # each part on pages of its own, near its rank
        with waits("MPI_Win_allocate_shared"):
            self.window = MPI.Win.Allocate_shared(2 * lanes * size, 1, info, comm)
        info.Free()
        self.parts = [np.frombuffer(self.window.Shared_query(q)[0], np.uint8)[:2 * lanes * size].reshape(lanes, 2, size)
                      for q in range(comm.size)]
        self.window.Lock_all(MPI.MODE_NOCHECK)

    def close(self) -> None:
        """Collective; no view of a part is used afterwards."""
        self.parts = []
        self.window.Unlock_all()
        with waits("MPI_Win_free"):
            self.window.Free()


def open_window(comm, lanes: int, wanted: int, ranks: int) -> Window | None:
    """A window for the ranks of `comm`, or None where they share no memory or there is none to spare.

    comm: of the ranks of a node, or None; wanted: bytes of one direction of a lane that this rank can use. All `ranks` of
    the node together take at most half of what is free.
    """
    if comm is None or comm.size == 1:
        return None
    try:
        disk = os.statvfs(SHARED)
        free = disk.f_bavail * disk.f_frsize
    except OSError:
        free = 0
    wanted = min(comm.allreduce(wanted, MPI.MAX), MOST_BYTES)
    size = min(wanted, comm.allreduce(free // (4 * lanes * ranks), MPI.MIN))
    return Window(comm, lanes, size // 4096 * 4096) if size >= LEAST_BYTES else None


class Mates:
    """Rows through a window between the places `mates` (this one is number `me` of them) on one lane, in one direction (0, 1).

    Rows for a mate stand in its memory by sender. Everybody knows the table n_qq: rows from q to q', so
    a sender knows where its rows belong, and who gets more than a part holds: that one gets messages.
    """

    def __init__(self, channel: Channel, mates: list[int], me: int, window: Window, lane: int, direction: int):
        self.channel, self.mates, self.me, self.window = channel, mates, me, window
        self.parts = [part[lane, direction] for part in window.parts]

    def _fits(self, n_qq: np.ndarray, q: int, width: int) -> bool:
        return int(n_qq[:, q].sum()) * width <= self.window.size

    def memory(self, n_qq: np.ndarray, width: int) -> np.ndarray | None:
        """This rank's part for its rows, uint8 [i, width], or None where they do not fit and need another place."""
        if not self._fits(n_qq, self.me, width):
            return None
        count = int(n_qq[:, self.me].sum())
        return self.parts[self.me][:count * width].reshape(count, width)

    def move(self, n_qq: np.ndarray, source: Callable, recv) -> Handle:
        """Fills recv, [i, ...]: memory(n_qq, width) where that is not None. source: of this rank's rows, sorted by mate."""
        recv = rows_as_bytes(recv)
        comm, me, width = self.channel.comm, self.me, recv.shape[1]
        first_qq, requests, keep = np.cumsum(n_qq, axis=0) - n_qq, [], []
        ends_q, shared = np.cumsum(n_qq[me]), self._fits(n_qq, me, width)

        def put(q: int, out: np.ndarray) -> None:
            source(slice(int(ends_q[q]) - len(out), int(ends_q[q])), out)

        for q, r in enumerate(self.mates):
            n, first = int(n_qq[q, me]), int(first_qq[q, me])
            if n and q != me:
                requests.append(comm.Irecv(EMPTY, r, TAG_THERE) if shared else comm.Irecv(recv[first:first + n], r, TAG_ROWS))
        for q in [*range(me, len(self.mates)), *range(me)]:
            n, first = int(n_qq[me, q]), int(first_qq[me, q])
            if n and q == me:
                put(q, recv[first:first + n])
            elif n and self._fits(n_qq, q, width):
                put(q, self.parts[q][first * width:(first + n) * width].reshape(n, width))
                self.window.window.Sync()
                requests.append(comm.Isend(EMPTY, self.mates[q], TAG_THERE))
            elif n:
                keep.append(np.empty((n, width), dtype=np.uint8))
                put(q, keep[-1])
                requests.append(comm.Isend(keep[-1], self.mates[q], TAG_ROWS))
        return Handle(lambda: requests, (recv, keep), finish=self.window.window.Sync if shared else None)


class Messages:
    """The same where ranks share no memory that can be written so (a GPU's): all rows of a mate in a message, by a
    transport between two ranks; row: the MPI datatype of one."""

    def __init__(self, channel: Channel, mates: list[int], me: int, transport: Callable, row: MPI.Datatype):
        self.channel, self.mates, self.me, self.transport, self.row = channel, mates, me, transport, row

    def memory(self, n_qq: np.ndarray, width: int) -> None:
        """Rows need a place of their own."""

    def move(self, n_qq: np.ndarray, source: Callable, recv: Any) -> Handle:
        """Fills recv, [i, ...]; the own rows are copied. To be called on the channel's lane."""
        n_send_r, n_recv_r = np.zeros((2, self.channel.comm.size), dtype=np.int64)
        n_send_r[self.mates], n_recv_r[self.mates] = n_qq[self.me], n_qq[:, self.me]
        place = self.mates[self.me]
        plan, rows = Plan.of(n_send_r, n_recv_r, place), source(slice(0, int(n_send_r.sum())))
        own, a, b = int(n_send_r[place]), int(plan.first_send_r[place]), int(plan.first_recv_r[place])
        if own:
            self.channel.device.copy(recv[b:b + own], rows[a:a + own])
        return self.transport(self.channel, rows, recv, plan, self.row)
