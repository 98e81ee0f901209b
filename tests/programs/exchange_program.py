"""Each transport, there and back, on random uneven counts, against what a plain gather of everything says."""

import sys

import numpy as np
from mpi4py import MPI

from hpcmoe.parallel import exchange
from hpcmoe.device import Device
from hpcmoe.parallel import selftest
from hpcmoe.parallel.exchange import Channel, Plan
from hpcmoe.parallel.handle import Waiter

comm = MPI.COMM_WORLD
me, size = comm.rank, comm.size
wait = Waiter(True, 60.0)
device = Device()
channel = Channel(comm, device, device.lane())
for name, transport in exchange.TRANSPORTS.items():
    for width, scale, seed in ((1, 3, 0), (7, 1, 1), (64, 40, 2), (33, 0, 3)):
        rng = np.random.default_rng(seed)  # the same on every rank: counts[a, b] rows from a to b
        counts = rng.integers(0, scale + 1, (size, size))
        counts[rng.random((size, size)) < 0.3] = 0
        if size > 1:
            counts[:, 1] = 0  # a rank that gets nothing
        values = [rng.normal(size=(counts[a].sum(), width)).astype(np.float32) for a in range(size)]
        plan = Plan.of(counts[me], counts[:, me], me)
        row = exchange.row_type(4 * width)
        send, recv = values[me].copy(), np.full((counts[:, me].sum(), width), np.nan, dtype=np.float32)
        handle = transport(channel, send, recv, plan, row)
        wait(handle, name)
        expected = [values[a][counts[a, :me].sum():counts[a, :me + 1].sum()] for a in range(size)]
        expected[me] = np.full_like(expected[me], np.nan)  # own rows are not touched
        np.testing.assert_array_equal(recv, np.concatenate(expected))
        recv[plan.first_recv_r[me]:plan.first_recv_r[me] + counts[me, me]] = expected[me] = values[me][counts[me, :me].sum():counts[me, :me + 1].sum()]
        back = np.full_like(send, np.nan)
        wait(transport(channel, recv, back, plan.back(), row), name)
        own = slice(plan.first_send_r[me], plan.first_send_r[me] + counts[me, me])
        back[own] = send[own]
        np.testing.assert_array_equal(back, send)
        row.Free()
    # One leader, blocks beyond what an MPI sends at once; the others hand in an empty part of what they receive into.
    row = exchange.row_type(256)
    blocks = [np.full((90 + r, 64), r, np.float32) for r in range(size)]
    for _ in range(3):
        n_r = np.array([len(b) for b in blocks])
        send, recv = (np.concatenate(blocks), np.zeros((n_r[0], 64), np.float32)) if me == 0 else (None, np.zeros((n_r[me], 64), np.float32))
        plan = Plan.of(n_r if me == 0 else 0 * n_r, np.where(np.arange(size) == 0, n_r[me], 0), me)
        wait(transport(channel, recv[:0] if send is None else send, recv, plan, row), name)
        assert me == 0 or (recv == me).all(), name
        back = recv[:0] if send is None else np.zeros_like(send)
        wait(transport(channel, recv, back, plan.back(), row), name)
        assert me or (back[n_r[0]:] == send[n_r[0]:]).all(), name
    row.Free()
table = selftest.self_test(comm, device)
assert all(fault == "" for fault in table.values()), table
comm.Barrier()
if me == 0:
    print("exchanged", *exchange.TRANSPORTS)
sys.stdout.flush()
