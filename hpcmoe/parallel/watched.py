"""A communicator whose blocking calls the watch knows of."""

from __future__ import annotations

from mpi4py import MPI

from hpcmoe.doing import HERE

BLOCKING = ("Allgather", "Allgatherv", "Allreduce", "Alltoall", "Alltoallv", "Barrier", "Bcast", "Dup", "Gather", "Gatherv", "Recv", "Reduce",
            "Scatter", "Scatterv", "Send", "Sendrecv", "Split", "Split_type", "allgather", "allreduce", "alltoall", "bcast", "gather",
            "recv", "reduce", "scatter", "send", "sendrecv")


class Watched(MPI.Intracomm):
    """As MPI.Intracomm; what it makes of itself is watched too. Watched(comm) is the same communicator as comm."""


def _watched(name: str):
    method = getattr(MPI.Intracomm, name)

    def call(self, *args, **kwargs):
        before, HERE.wait = HERE.wait, (name, None)  # doing.waits, for calls that are measured
        try:
            result = method(self, *args, **kwargs)
        finally:
            HERE.wait = before
        return Watched(result) if isinstance(result, MPI.Intracomm) else result

    return call


for _name in BLOCKING:
    setattr(Watched, _name, _watched(_name))
