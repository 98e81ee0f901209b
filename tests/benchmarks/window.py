"""Handing rows on inside a node: by messages, or written straight into the receiver's part of a shared window.

    mpiexec -n 2 python -m mpi4py tests/benchmarks/window.py --rows 16,64,256,1024

Every rank gathers rows for every other rank of its node out of a larger array, as the hierarchical exchange
does. *messages*: into a buffer that Isend reads; Irecv into the expert's rows. *window*: into the receiver's
rows themselves, in memory of MPI_Win_allocate_shared, and an empty message says that they are there.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
from mpi4py import MPI


def wait(requests: list) -> None:
    while not MPI.Request.Testall(requests):
        os.sched_yield()


class HandOn:
    """`rows` rows of width d from each rank to each other one, both ways of doing it, on the same numbers."""

    def __init__(self, node, rows: int, d: int):
        self.node, self.rows, self.peers = node, rows, [r for r in range(node.size) if r != node.rank]
        rng = np.random.default_rng(node.rank)
        self.x_td = rng.random((rows * node.size, d), dtype=np.float32)
        self.token_rs = [rng.permutation(len(self.x_td))[:rows] for _ in range(node.size)]
        self.send, self.recv = (np.zeros((node.size, rows, d), dtype=np.float32) for _ in range(2))
        self.window = MPI.Win.Allocate_shared(self.recv.nbytes, 4, comm=node)
        self.parts = [np.frombuffer(self.window.Shared_query(r)[0], np.float32).reshape(self.recv.shape) for r in range(node.size)]
        for part in self.parts:
            part[node.rank] = 0  # the pages are there before the clock runs
        self.window.Lock_all()

    def _gather(self, r: int, out) -> None:
        np.take(self.x_td, self.token_rs[r], axis=0, out=out, mode="clip")

    def messages(self) -> None:
        requests = [self.node.Irecv(self.recv[r], r) for r in self.peers]
        for r in self.peers:
            self._gather(r, self.send[r])
            requests.append(self.node.Isend(self.send[r], r))
        wait(requests)

    def through_window(self) -> None:
        empty = np.zeros(0, np.uint8)
        requests = [self.node.Irecv(empty, r) for r in self.peers]
        for r in self.peers:
            self._gather(r, self.parts[r][self.node.rank])
            self.window.Sync()
            requests.append(self.node.Isend(empty, r))
        wait(requests)
        self.window.Sync()

    def same(self) -> bool:
        return all(np.array_equal(self.recv[r], self.parts[self.node.rank][r]) for r in self.peers)

    def close(self) -> None:
        self.window.Unlock_all()
        self.parts = []
        self.window.Free()


def median_ms(comm, func, repeats: int) -> float:
    """Of the slowest rank."""
    seconds = []
    for _ in range(repeats):
        comm.Barrier()
        start = time.perf_counter()
        func()
        seconds.append(time.perf_counter() - start)
    return float(np.median(np.max(comm.allgather(seconds), axis=0))) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=[4, 16, 64, 256, 1024], type=lambda text: [int(n) for n in text.split(",")], help="to each other rank")
    parser.add_argument("--d", default=1024, type=int)
    parser.add_argument("--repeats", default=41, type=int)
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    if comm.rank == 0:
        print(f"{node.size} ranks on a node with {os.cpu_count()} cores, rows of {4 * args.d} bytes, median of {args.repeats}")
        print(" rows  messages ms  window ms  messages/window")
    for rows in args.rows:
        case = HandOn(node, rows, args.d)
        case.messages(), case.through_window(), comm.Barrier()
        assert all(comm.allgather(case.same())), "the two ways differ"
        a, b = median_ms(comm, case.messages, args.repeats), median_ms(comm, case.through_window, args.repeats)
        if comm.rank == 0:
            print(f"{rows:5d}  {a:11.3f}  {b:9.3f}  {a / b:15.2f}", flush=True)
        case.close()


if __name__ == "__main__":
    main()
