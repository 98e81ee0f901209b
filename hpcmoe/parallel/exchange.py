"""Moving rows between the ranks of a stage: interchangeable transports, and the wait with a deadline.

Counts are in rows; a committed MPI datatype carries the width and type of a row. A rank's own rows
never pass through MPI: callers give their own place a count of 0 and copy.
"""

from __future__ import annotations

import os
import time
from typing import Callable, NamedTuple

import numpy as np
from mpi4py import MPI

from hpcmoe.device import to_host, xp_of
from hpcmoe.errors import Stalled, UserError


class Handle:
    """Messages in flight. Keeps their buffers alive; `finish` runs once, when all have arrived."""

    def __init__(self, requests: list, keep: tuple = (), finish: Callable[[], None] | None = None):
        self.requests, self.keep, self.finish = requests, keep, finish

    def test(self) -> bool:
        """True once everything has arrived (and `finish` has run)."""
        if self.requests is not None:
            if self.requests and not MPI.Request.Testall(self.requests):
                return False
            self.requests = None
            if self.finish:
                self.finish()
        return True


class Waiter:
    """Waits by polling, so that a deadline can end a job that would hang for ever.

    crowded: more ranks than cores; then a waiting rank soon sleeps instead of burning the core
    that the rank it waits for needs. stall_s: seconds without an answer before giving up.
    """

    def __init__(self, crowded: bool, stall_s: float):
        self.crowded, self.stall_s = crowded, stall_s

    def __call__(self, handle: Handle, what: object) -> None:
        """Returns when the handle is done; raises Stalled, naming `what`, after stall_s seconds."""
        if handle.test():
            return
        start, polls = time.monotonic(), 0
        while not handle.test():
            polls += 1
            if self.crowded:
                # A poll of many ranks over a network costs system calls: the longer the wait, the rarer.
                os.sched_yield() if polls < 20 else time.sleep(min(max(0.0002, (time.monotonic() - start) / 100), 0.005))
            elif polls % 64 == 0:
                os.sched_yield()
            if polls % 256 == 0 and time.monotonic() - start > self.stall_s:
                raise Stalled(f"{what} made no progress for {self.stall_s:g} s: "
                              "a rank or a link may be dead (deadline: run.stall_s)")


class Plan(NamedTuple):
    """Rows to and from each place of the stage: counts, and the row at which each block starts."""

    n_send_r: np.ndarray
    first_send_r: np.ndarray
    n_recv_r: np.ndarray
    first_recv_r: np.ndarray

    @classmethod
    def of(cls, n_send_r, n_recv_r, me: int) -> "Plan":
        """The plan in which the own block keeps its place and travels by copy (count 0)."""
        first_send_r, first_recv_r = np.cumsum(n_send_r) - n_send_r, np.cumsum(n_recv_r) - n_recv_r
        n_send_r, n_recv_r = n_send_r.copy(), n_recv_r.copy()
        n_send_r[me] = n_recv_r[me] = 0
        return cls(n_send_r, first_send_r, n_recv_r, first_recv_r)

    def back(self) -> "Plan":
        """The same rows on their way back."""
        return Plan(self.n_recv_r, self.first_recv_r, self.n_send_r, self.first_send_r)


# ---------------------------------------------------------------- transports
def ialltoallv(comm, send, recv, plan: Plan, row: MPI.Datatype) -> Handle:
    """One MPI_Ialltoallv (MPI 4.1, section 6.12.6) on the buffers themselves."""
    request = comm.Ialltoallv([send, (plan.n_send_r, plan.first_send_r), row], [recv, (plan.n_recv_r, plan.first_recv_r), row])
    return Handle([request], (send, recv))


def pairwise(comm, send, recv, plan: Plan, row: MPI.Datatype) -> Handle:
    """Isend and Irecv with each peer that has rows, nearest higher place first."""
    requests = []
    me, size = comm.rank, comm.size
    width = row.Get_size()
    send_bytes, recv_bytes = (a.reshape(-1).view(np.uint8) for a in (send, recv))
    for shift in range(1, size):
        source, target = (me - shift) % size, (me + shift) % size
        n, first = int(plan.n_recv_r[source]), int(plan.first_recv_r[source])
        if n:
            requests.append(comm.Irecv([recv_bytes[first * width:], n, row], source))
        n, first = int(plan.n_send_r[target]), int(plan.first_send_r[target])
        if n:
            requests.append(comm.Isend([send_bytes[first * width:], n, row], target))
    return Handle(requests, (send, recv))


def staged(comm, send, recv, plan: Plan, row: MPI.Datatype) -> Handle:
    """Through host memory of its own: for an MPI that cannot read the buffers where they are."""
    xp = xp_of(recv)
    send_host = np.array(to_host(send))
    recv_host = np.empty(recv.shape, dtype=recv.dtype)
    handle = ialltoallv(comm, send_host, recv_host, plan, row)
    blocks = [(int(a), int(a + n)) for a, n in zip(plan.first_recv_r, plan.n_recv_r) if n]

    def finish() -> None:
        for a, b in blocks:
            recv[a:b] = xp.asarray(recv_host[a:b])

    return Handle(handle.requests, (send, recv, send_host, recv_host), finish)


TRANSPORTS = {"ialltoallv": ialltoallv, "pairwise": pairwise, "staged": staged}


def row_type(width: int, dtype) -> MPI.Datatype:
    """A committed datatype of one row of `width` elements."""
    return MPI.BYTE.Create_contiguous(width * np.dtype(dtype).itemsize).Commit()


# ---------------------------------------------------------------- self-test
def self_test(comm, xp=np) -> dict[str, str]:
    """Runs each transport on known rows, uneven and empty blocks among them, on all ranks of `comm`.

    Returns name -> "" where every rank got the right values, else what was wrong on the first rank.
    """
    result = {}
    for name, transport in TRANSPORTS.items():
        faults = comm.allgather(_try(comm, transport, xp))
        bad = [f"rank {r}: {text}" for r, text in enumerate(faults) if text]
        result[name] = bad[0] if bad else ""
    return result


def _try(comm, transport, xp) -> str:
    me, size, width = comm.rank, comm.size, 5
    everyone = np.arange(size)
    n_send_r, n_recv_r = (me + everyone) % 3, (everyone + me) % 3
    plan = Plan.of(n_send_r, n_recv_r, me)
    row = row_type(width, np.float32)
    send = xp.asarray(np.repeat(me * 1000.0 + everyone, n_send_r)[:, None] + np.zeros(width), dtype=np.float32)
    recv = xp.full((int(n_recv_r.sum()), width), -1, dtype=np.float32)
    expected = np.repeat(everyone * 1000.0 + me, n_recv_r)
    try:
        Waiter(True, 60.0)(transport(comm, send, recv, plan, row), "self-test")
    except (MPI.Exception, Stalled) as error:
        return str(error)
    finally:
        row.Free()
    own = slice(plan.first_recv_r[me], plan.first_recv_r[me] + n_recv_r[me])
    expected[own] = -1  # own rows are the caller's to copy
    return "" if (to_host(recv) == expected[:, None]).all() else "wrong values arrived"


def choose(stage, world, name: str) -> str:
    """The transport of the run: the first in order that passes the self-test in every stage, or `name`.

    stage, world: the communicators of a stage and of all ranks. Raises UserError, the same on all
    ranks, where the one asked for (or every one) fails.
    """
    table = self_test(stage)
    faults = {n: next((t[n] for t in world.allgather(table) if t[n]), "") for n in TRANSPORTS}
    wanted = [name] if name != "auto" else list(TRANSPORTS)
    for candidate in wanted:
        if not faults[candidate]:
            return candidate
    raise UserError(f"job: run.transport = {name!r}: failed its self-test: " +
                    "; ".join(f"{n}: {faults[n]}" for n in wanted))
