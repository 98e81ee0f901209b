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
        from hpcmoe.parallel import exchange

        def broken(comm, send, recv, plan, row):
            handle = exchange.ialltoallv(comm, send, recv, plan, row)
            return exchange.Handle(handle.requests, handle.keep, lambda: recv.__setitem__(slice(-1, None), 7))

        exchange.TRANSPORTS["broken"] = broken
        table = exchange.self_test(MPI.COMM_WORLD)
        if MPI.COMM_WORLD.rank == 0:
            print(sorted((name, bool(fault)) for name, fault in table.items()))
        try:
            exchange.choose(MPI.COMM_WORLD, MPI.COMM_WORLD, "broken")
        except exchange.UserError as error:
            if MPI.COMM_WORLD.rank == 0:
                print(error)
        assert exchange.choose(MPI.COMM_WORLD, MPI.COMM_WORLD, "auto") == "ialltoallv"
    """).check()
    assert "[('broken', True), ('ialltoallv', False), ('pairwise', False), ('staged', False)]" in done.out
    assert "run.transport = 'broken': failed its self-test" in done.out and "wrong values" in done.out


def test_waiting_ends_at_the_deadline_and_names_the_op():
    from hpcmoe.errors import Stalled
    from hpcmoe.parallel.exchange import Waiter

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
