"""Device buffers through real MPI libraries, on the driver stand-in, where an access by the CPU ends the process."""

import pytest

from cudabed import bed
from mpi import run_ranks

pytestmark = pytest.mark.skipif(bool(bed.missing()), reason=bed.missing() or "here")
PROGRAM = "tests/programs/device_exchange_program.py"


def exchange(ranks: int, mpi, *what: str, **settings):
    env = bed.lookalike_env(mpi, FAKECUDA_TOTAL_MIB="512", **settings)
    return run_ranks(ranks, ["-m", "mpi4py", PROGRAM, *what], env=env, timeout=400)


@pytest.mark.parametrize("ranks", [2, 4, 16])
@pytest.mark.parametrize("mpi", bed.MPIS)
def test_an_mpi_that_knows_gpus_moves_device_buffers(mpi, ranks):
    reason = bed.missing_mpi(mpi)
    if reason:
        pytest.skip(reason)
    done = exchange(ranks, mpi, "plain", "ialltoallv", "pairwise", "staged").check()
    assert done.out.split() == ["exchanged", "plain", "ialltoallv", "pairwise", "staged"]


@pytest.mark.parametrize("mpi", bed.MPIS)
def test_the_device_may_be_chosen_after_mpi_is_up(mpi):
    reason = bed.missing_mpi(mpi)
    if reason:
        pytest.skip(reason)
    assert exchange(3, mpi, "late", "plain", "pairwise").check().out.split() == ["exchanged", "plain", "pairwise"]


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_staged_needs_no_mpi_that_knows_gpus(ranks):
    assert exchange(ranks, None, "staged").check().out.split() == ["exchanged", "staged"]


@pytest.mark.mpi
def test_an_mpi_that_reads_device_memory_with_the_cpu_dies():
    done = exchange(2, None, "plain")
    assert done.rc in (11, 139) and "exchanged" not in done.out  # SIGSEGV


@pytest.mark.parametrize("mpi", bed.MPIS)
def test_sending_what_is_not_there_yet_is_seen(mpi):
    reason = bed.missing_mpi(mpi)
    if reason:
        pytest.skip(reason)
    done = run_ranks(2, """
        import cupy, numpy as np
        cupy.cuda.runtime.free(0)
        from mpi4py import MPI
        comm = MPI.COMM_WORLD
        send, recv = cupy.zeros(100, np.float32), cupy.zeros(100, np.float32)
        cupy.cuda.runtime.deviceSynchronize()
        send.fill(comm.rank + 1)  # and no wait
        comm.Sendrecv(send, 1 - comm.rank, recvbuf=recv, source=1 - comm.rank)
        if comm.rank == 0:
            print(set(recv.get().tolist()))
    """, env=bed.lookalike_env(mpi)).check()
    assert done.out.strip() == "{0.0}"


@pytest.mark.parametrize("mpi", bed.MPIS)
def test_rows_by_way_of_forwarders_in_device_memory(mpi):
    """Right sums, rows between nodes and launches per layer, over nodes of one, two and three ranks: the program checks and counts."""
    reason = bed.missing_mpi(mpi)
    if reason:
        pytest.skip(reason)
    env = bed.lookalike_env(mpi, FAKECUDA_TOTAL_MIB="512")
    done = run_ranks(6, ["-m", "mpi4py", "tests/programs/device_relay_program.py", "direct", "staged"], env=env, timeout=400).check()
    *launches, last = done.out.strip().splitlines()
    assert last == "relayed direct staged" and len(launches) == 3
    # numbers to the device, own rows out and back; zeros for the trial
    assert {line.split(" ", 2)[2] for line in launches} == {"memcpyAsyncx3 memsetAsyncx1 merge_some_4x1 rows_16x2 sum_some_4x1"}
