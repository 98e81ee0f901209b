"""A program of N ranks that ends in the way its argument names; run by test_launch.py."""

import os
import sys

from hpcmoe import environment, launch
from hpcmoe.errors import AgreedError, UserError


def work():
    how, rank = sys.argv[1], environment.env_rank(os.environ)
    if how == "user error before MPI":
        raise UserError("no such file: a.toml")
    if how == "one rank before MPI" and rank == 1:
        raise UserError("no such file: a.toml")
    MPI = launch.start_mpi()
    world = MPI.COMM_WORLD
    if how == "well":
        assert MPI.Query_thread() == MPI.THREAD_MULTIPLE
        print(f"rank {rank} of {world.size}\n", end="", flush=True)
        return 0
    if how == "exit code":
        return 1
    if how == "agreed":
        raise AgreedError("job.toml: run.lanes = 0: expected an integer >= 1")
    if how == "user error everywhere":
        raise UserError("no such file: a.toml")
    if how == "two texts":
        raise UserError(f"no such file: {'a' if rank else 'b'}.toml")
    if how == "internal error everywhere":
        raise ValueError("bad value")
    if rank == 1:
        if how == "internal error":
            raise ValueError("bad value")
        if how == "disk full":
            raise OSError(28, "No space left on device", "out.part")
        if how == "no memory":
            raise MemoryError("cannot allocate 7 GB")
        if how == "exit":
            os._exit(3)
    if rank in (1, 2) and how == "two ranks":
        raise ValueError("bad value")
    if rank == 0 and how == "wait":
        print("READY", flush=True)
    world.recv(source=(rank + 1) % world.size, tag=99)  # nothing was sent: waits for ever inside MPI


if __name__ == "__main__":
    raise SystemExit(launch.run_main(work))
