"""Device buffers through MPI: `plain` calls, or hpcmoe's transports by name; all values are checked. `late`
before them: the device's context is made after MPI was initialised.

Run on the CuPy look-alike, where an access by the CPU to device memory ends the process.
"""

import sys

import cupy
import numpy as np

late = sys.argv[1] == "late"
if not late:
    cupy.cuda.runtime.free(0)  # the context, before MPI looks for one
from mpi4py import MPI  # noqa: E402

cupy.cuda.runtime.free(0)

comm = MPI.COMM_WORLD
me, size = comm.rank, comm.size
# (elements of a row, most rows): from nothing over messages sent at once to such that are negotiated first
CASES = ((1, 3), (7, 1), (64, 40), (33, 0), (1024, 500))


def cases():
    """(counts[a, b] rows from a to b, width, values[a] of each rank), the same on every rank."""
    for seed, (width, most) in enumerate(CASES if size <= 4 else CASES[::2]):
        rng = np.random.default_rng(seed)
        counts = rng.integers(0, most // max(1, size // 4) + 1, (size, size))
        counts[rng.random((size, size)) < 0.3] = 0
        counts[:, 1 % size] = 0  # a rank that gets nothing
        yield counts, width, [rng.normal(size=(counts[a].sum(), width)).astype(np.float32) for a in range(size)]


def expected(counts, values) -> np.ndarray:
    """What has arrived; own rows, which MPI does not carry, are NaN."""
    parts = [values[a][counts[a, :me].sum():counts[a, :me + 1].sum()] for a in range(size)]
    parts[me] = np.full_like(parts[me], np.nan)
    return np.concatenate(parts)


def plain() -> None:
    """MPI_Ialltoallv with an own count of 0, and MPI_Isend, MPI_Irecv, on arrays of the look-alike."""
    for counts, width, values in cases():
        row = MPI.FLOAT.Create_contiguous(width).Commit()
        out, into = counts[me].copy(), counts[:, me].copy()
        first_out, first_into = np.cumsum(out) - out, np.cumsum(into) - into
        out[me] = into[me] = 0

        def address(array, first: int):
            skip = 4 * width * int(first)
            return MPI.buffer.fromaddress(array.data.ptr + skip, array.nbytes - skip)

        for pairs in (False, True):
            send, recv = cupy.asarray(values[me]), cupy.full((counts[:, me].sum(), width), np.nan, np.float32)
            cupy.cuda.get_current_stream().synchronize()
            if pairs:
                requests = [comm.Irecv([address(recv, first_into[r]), int(into[r]), row], r) for r in range(size) if into[r]]
                requests += [comm.Isend([address(send, first_out[r]), int(out[r]), row], r) for r in range(size) if out[r]]
            else:
                requests = [comm.Ialltoallv([address(send, 0), (out, first_out), row], [address(recv, 0), (into, first_into), row])]
            MPI.Request.Waitall(requests)
            np.testing.assert_array_equal(recv.get(), expected(counts, values))
        row.Free()


def transport(name: str) -> None:
    """A transport there and back; the sender's rows come from work that nobody has waited for."""
    from hpcmoe.device import Gpu
    from hpcmoe.parallel import exchange
    from hpcmoe.parallel.exchange import Channel, Plan
    from hpcmoe.parallel.handle import Waiter
    from hpcmoe.parallel.selftest import self_test
    gpu, wait = Gpu(0), Waiter(True, 60.0)
    channel = Channel(comm, gpu, gpu.lane())
    move = exchange.TRANSPORTS[name]
    for counts, width, values in cases():
        plan, row = Plan.of(counts[me], counts[:, me], me), exchange.row_type(4 * width)
        with channel.lane:
            send, recv = gpu.upload(values[me]), cupy.full((counts[:, me].sum(), width), np.nan, np.float32)
            wait(move(channel, send, recv, plan, row), name)
            there = recv.get()
            back = cupy.full(send.shape, np.nan, np.float32)
            wait(move(channel, recv, back, plan.back(), row), name)
            again = back.get()
        np.testing.assert_array_equal(there, expected(counts, values))
        own = slice(plan.first_send_r[me], plan.first_send_r[me] + counts[me, me])
        values[me][own] = np.nan
        np.testing.assert_array_equal(again, values[me])
        row.Free()
    assert self_test(comm, gpu, [name]) == {name: ""}


for what in sys.argv[1 + late:]:
    plain() if what == "plain" else transport(what)
comm.Barrier()
if me == 0:
    print("exchanged", *sys.argv[1 + late:])
