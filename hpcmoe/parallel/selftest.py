"""The start-up self-test of the transports: what gives right results here, on these buffers."""

from __future__ import annotations

import ctypes
import os
import re

import numpy as np
from mpi4py import MPI

from hpcmoe.device import Device, to_host
from hpcmoe.errors import Stalled, UserError
from hpcmoe.parallel.exchange import TRANSPORTS, Channel, Plan, row_type
from hpcmoe.parallel.handle import Waiter

ABANDONED: list = []
LARGE = 2**31 + 2**27  # bytes of the buffers of the large test: more than an int counts
LIMIT_S = 40.0  # of one transport's messages: one that hangs is a fault
MARGIN = 1 << 30  # bytes that the large test leaves to others
WIDTHS = (20, 64, 4099)  # bytes of a row: whole words, aligned to 16, and odd
BY_ADDRESS = ("ialltoallv", "pairwise")  # what gives MPI whole buffers; `staged` cuts them into small pieces


def self_test(comm, device: Device, names=tuple(TRANSPORTS)) -> dict[str, str]:
    """Runs transports on known rows of several widths, empty and uneven blocks among them, on all ranks of `comm`.

    Returns name -> "" where every rank got the right values and nothing else was touched, else what
    was wrong on the first rank.
    """
    everyone = np.arange(comm.size)
    n_r = (comm.rank + everyone) % 3  # to and from each
    first_r = np.cumsum(n_r) - n_r
    return {name: _agreed(comm, [(name, width, n_r, first_r) for width in WIDTHS], device) for name in names}


def large_test(comm, device: Device, names=BY_ADDRESS) -> dict[str, str]:
    """The same with blocks at both ends of buffers of more than 2 GiB: little of them is used."""
    everyone, n_r = np.arange(comm.size), np.full(comm.size, 2)
    first_r = 2 * everyone + np.where(2 * everyone < comm.size, 0, LARGE // 4096 - 2 * comm.size)
    return {name: _agreed(comm, [(name, 4096, n_r, first_r)], device) for name in names if comm.size > 1}


def _agreed(comm, cases: list[tuple], device: Device) -> str:
    """"" where all ranks found all cases right, else the fault of the first that did not."""
    faults = comm.allgather(next((fault for case in cases if (fault := _try(comm, device, *case))), ""))
    return next((f"rank {r}: {text}" for r, text in enumerate(faults) if text), "")


def _try(comm, device: Device, name: str, width: int, n_r, first_r) -> str:
    """Sends n_r rows to each rank and receives as many, blocks at first_r; "" or what went wrong."""
    me, everyone = comm.rank, np.arange(comm.size)
    mine = np.where(everyone == me, 0, n_r)
    plan = Plan(mine, first_r, mine, first_r)
    row, lane = row_type(width), device.lane()
    blocks = [slice(int(a), int(a + n)) for a, n in zip(first_r, n_r)]
    try:
        with lane:
            send, recv = (device.empty((int((first_r + n_r).max()), width), np.uint8) for _ in range(2))
            for r, block in enumerate(blocks):
                device.copy(send[block], device.upload(_values(me, r, n_r[r], width)))
                device.copy(recv[block], device.upload(np.full((int(n_r[r]), width), 255, np.uint8)))
            wait = Waiter(True, LIMIT_S)
            wait(TRANSPORTS[name](Channel(comm, device, lane), send, recv, plan, row), "self-test")
            device.event().record().wait()
            got = [to_host(recv[block]) for block in blocks]
    except (MPI.Exception, Stalled) as error:
        ABANDONED.append((send, recv))  # what did not arrive may do so later
        return str(error)
    finally:
        row.Free()
    for r in everyone:
        # own rows are the caller's to copy
        wanted = np.full((int(n_r[r]), width), 255, np.uint8) if r == me else _values(r, me, n_r[r], width)
        if not np.array_equal(got[r], wanted):
            return f"wrong values arrived in rows of {width} bytes"
    return ""


def _values(source: int, target: int, rows: int, width: int) -> np.ndarray:
    """Bytes that tell sender, receiver, row and column; never 255."""
    first = (31 * source + 7 * target + 3 * np.arange(rows)) % 251
    return (first[:, None] + np.arange(width)[None, :] % 4).astype(np.uint8)


# ---------------------------------------------------------------- does this MPI read device memory?
def cuda_aware() -> tuple[bool, str]:
    """Whether this MPI says that it moves device buffers, and what says so. Nothing is tried: where an
    MPI does not know device memory, a try ends the process."""
    if os.environ.get("HPCMOE_CUDA_AWARE", "") in ("0", "1"):
        return os.environ["HPCMOE_CUDA_AWARE"] == "1", f"HPCMOE_CUDA_AWARE={os.environ['HPCMOE_CUDA_AWARE']}"
    if os.environ.get("MPICH_GPU_SUPPORT_ENABLED") == "1" and "MPICH" in MPI.get_vendor()[0]:
        return True, "MPICH_GPU_SUPPORT_ENABLED=1"
    for path in _mpi_libraries():
        query = getattr(ctypes.CDLL(path), "MPIX_Query_cuda_support", None)
        if query is not None:
            return bool(query()), f"MPIX_Query_cuda_support() of {os.path.basename(path)} is {query()}"
    return False, "no sign of it: neither MPIX_Query_cuda_support nor MPICH_GPU_SUPPORT_ENABLED"


def _mpi_libraries() -> list[str]:
    """Files of MPI libraries that this process has loaded."""
    with open("/proc/self/maps") as maps:
        found = {line.split()[-1] for line in maps if re.search(r"/libmpi[^/]*\.so[^/]*$", line.strip())}
    return sorted(found)


def choose(stage, world, name: str, device: Device, room: int = 0) -> tuple[str, dict[str, str]]:
    """The transport of the run, and the faults of each: the first that passes, or `name`.

    stage, world: the communicators of a stage and of all ranks. On a GPU transports on device buffers are
    tried where the MPI says that it knows them: else the try would end the process; room: bytes that this
    rank may use for the large test, which takes place where all ranks have enough. `pairwise` is tried in
    any case: rows go from stage to stage as its messages do. Raises UserError, the same on all ranks,
    where the one asked for (or every one) fails.
    """
    wanted = [name] if name != "auto" else list(TRANSPORTS)
    tried = list(dict.fromkeys([*wanted, "pairwise"]))
    faults = {}
    if device.kind == "gpu":
        aware, sign = cuda_aware()
        if not all(world.allgather(aware)):
            faults = {n: f"this MPI does not say that it is CUDA-aware ({sign}; HPCMOE_CUDA_AWARE=1 tries it all the same)"
                      for n in tried if n in BY_ADDRESS}
    tests = (self_test, large_test) if min(world.allgather(room)) > 2 * LARGE + MARGIN else (self_test,)
    for test in tests:
        left = [n for n in tried if not faults.get(n) and (test is self_test or n in BY_ADDRESS)]
        tables = world.allgather(test(stage, device, left))
        faults |= {n: next((t[n] for t in tables if t.get(n)), "") for n in left}
    for candidate in wanted:
        if not faults[candidate]:
            return candidate, faults
    raise UserError(f"job: run.transport = {name!r}: failed its self-test: " +
                    "; ".join(f"{n}: {faults[n]}" for n in wanted))
