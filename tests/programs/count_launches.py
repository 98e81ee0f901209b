"""Runs a job (arguments as for hpcmoe) on the CuPy look-alike and prints what one op of each kind queued in decode at
most, over all its calls: kernels, products and copies, by rank 0."""

import sys
from collections import Counter

import cupy

from hpcmoe import cli
from hpcmoe.parallel.timer import Timer

most: dict[str, Counter] = {}
timed = Timer.__call__


def counted(self, op, step, func):
    before = Counter(cupy.launches)
    result = timed(self, op, step, func)
    here = Counter(cupy.launches) - before
    if step > 1 and here.total() > most.get(op.kind, Counter()).total():
        most[op.kind] = here
    return result


Timer.__call__ = counted
code = cli.main(sys.argv[1:])
from mpi4py import MPI  # noqa: E402  pylint: disable=wrong-import-position

if MPI.COMM_WORLD.rank == 0:
    for kind, here in most.items():
        print("LAUNCHES", kind, here.total(), *(f"{name}x{n}" for name, n in sorted(here.items())))
sys.exit(code)
