"""Transports on real ranks; the deadline; a self-test that can fail."""

import time

import numpy as np
import pytest

from mpi import run_ranks


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
def test_rows_arrive_where_they_should_and_come_back(ranks):
    done = run_ranks(ranks, ["-m", "mpi4py", "tests/programs/exchange_program.py"]).check()
    assert done.out.split() == ["exchanged", "ialltoallv", "pairwise", "staged"]


@pytest.mark.mpi
def test_a_transport_that_moves_wrong_values_fails_its_self_test():
    done = run_ranks(3, """
        import numpy as np
        from mpi4py import MPI
        from hpcmoe.device import Device
        from hpcmoe.parallel import exchange, selftest

        def broken(channel, send, recv, plan, row):
            handle = exchange.ialltoallv(channel, send, recv, plan, row)
            handle.finish = lambda: recv.__setitem__(slice(-1, None), 7)
            return handle

        exchange.TRANSPORTS["broken"] = broken
        table = selftest.self_test(MPI.COMM_WORLD, Device(), list(exchange.TRANSPORTS))
        if MPI.COMM_WORLD.rank == 0:
            print(sorted((name, bool(fault)) for name, fault in table.items()))
        try:
            selftest.choose(MPI.COMM_WORLD, MPI.COMM_WORLD, "broken", Device())
        except selftest.UserError as error:
            if MPI.COMM_WORLD.rank == 0:
                print(error)
        assert selftest.choose(MPI.COMM_WORLD, MPI.COMM_WORLD, "auto", Device())[0] == "ialltoallv"
    """).check()
    assert "[('broken', True), ('ialltoallv', False), ('pairwise', False), ('staged', False)]" in done.out
    assert "run.transport = 'broken': failed its self-test" in done.out and "wrong values" in done.out


@pytest.mark.mpi
def test_places_beyond_two_gibibytes_are_reached():
    done = run_ranks(3, """
        from mpi4py import MPI
        from hpcmoe.device import Device
        from hpcmoe.parallel import selftest
        assert selftest.large_test(MPI.COMM_WORLD, Device()) == {"ialltoallv": "", "pairwise": ""}
    """).check()
    assert done.err == ""


def test_waiting_ends_at_the_deadline_and_names_the_op():
    from hpcmoe.errors import Stalled
    from hpcmoe.parallel.handle import Waiter

    class Never:
        def test(self):
            return False

    start = time.monotonic()
    with pytest.raises(Stalled, match="DISPATCH.1.0.*0.3 s"):
        Waiter(True, 0.3)(Never(), "DISPATCH.1.0")
    assert time.monotonic() - start < 3


def test_the_own_block_keeps_its_place_and_is_not_sent():
    from hpcmoe.parallel.exchange import Plan
    plan = Plan.of(np.array([2, 3, 1]), np.array([4, 3, 0]), 1)
    assert plan.n_send_r.tolist() == [2, 0, 1] and plan.first_send_r.tolist() == [0, 2, 5]
    assert plan.n_recv_r.tolist() == [4, 0, 0] and plan.first_recv_r.tolist() == [0, 4, 7]


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["pairwise", "staged"])
def test_rows_are_on_their_way_once_an_exchange_is_begun(name):
    """Rank 0 begins one and then waits for something else: rank 1 gets its rows all the same."""
    run_ranks(2, f'''
        import time
        import numpy as np
        from mpi4py import MPI
        from hpcmoe.device import Device
        from hpcmoe.parallel.exchange import TRANSPORTS, Channel, Plan, row_type
        comm, device = MPI.COMM_WORLD, Device()
        n_r = np.full(2, 3)
        send, recv = np.full((6, 5), 1.0 + comm.rank, np.float32), np.zeros((6, 5), np.float32)
        handle = TRANSPORTS[{name!r}](Channel(comm.Dup(), device, device.lane()), send, recv, Plan.of(n_r, n_r, comm.rank), row_type(20))
        end = time.monotonic() + 30
        while comm.rank and not handle.test() and time.monotonic() < end:
            time.sleep(0.001)
        assert comm.rank == 0 or (handle.over and (recv[:3] == 1).all())
        comm.Barrier()
        while not handle.test():
            pass
        assert comm.rank == 1 or (recv[3:] == 2).all()
    ''').check()
