"""What the launcher's environment variables say: how many processes it started, which one this is.

MPI can disagree: ranks that srun started with another kind of PMI than their MPI speaks are each
alone, in a world of size 1, and would do the whole job once per process. No MPI is needed here.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from typing import Mapping, NamedTuple

from hpcmoe.errors import UserError

# Below mpirun and mpiexec the SLURM_* values describe the launcher's own daemons, so srun comes last.
MPIRUN, HYDRA, SRUN, OTHER = "mpirun of Open MPI", "mpiexec of MPICH", "srun", "a PMI launcher"


class Launched(NamedTuple):
    """size: processes that the launcher started; source: the launcher and the variable that says so."""

    size: int
    source: str


@dataclass(frozen=True)
class _Names:
    """The variables of one launcher; "" where it has none."""

    size: str
    rank: str
    local_rank: str
    local_size: str


_NAMES = {
    MPIRUN: _Names("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
                   "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    HYDRA: _Names("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    SRUN: _Names("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),
    OTHER: _Names("PMI_SIZE", "PMI_RANK", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
}


class AloneError(UserError):
    """The launcher started several processes and MPI joined none of them."""


def launcher(env: Mapping[str, str]) -> str | None:
    """The launcher of this process: MPIRUN, HYDRA, SRUN, OTHER, or None for a plain process.

    A process of an sbatch script has SLURM_NTASKS but is no task of a step: a plain process.
    """
    if "OMPI_COMM_WORLD_SIZE" in env:
        return MPIRUN
    if "PMI_SIZE" in env and ("MPI_LOCALNRANKS" in env or "HYDI_CONTROL_FD" in env):
        return HYDRA
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        return SRUN
    return OTHER if "PMI_SIZE" in env else None


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "") if name else ""
    return int(text) if text.isdecimal() else None


def launched_size(env: Mapping[str, str]) -> Launched | None:
    """How many processes the launcher started and what says so; None where nothing does."""
    kind = launcher(env)
    if kind is None:
        return None
    size = _number(env, _NAMES[kind].size)
    return None if size is None else Launched(size, f"{kind}, {_NAMES[kind].size}")


def launched_many(env: Mapping[str, str]) -> bool:
    """Whether this is one of several processes."""
    launched = launched_size(env)
    return launched is not None and launched.size > 1


def env_rank(env: Mapping[str, str]) -> int:
    """The rank that the launcher gave this process, 0 for a plain process."""
    kind = launcher(env)
    return (_number(env, _NAMES[kind].rank) if kind else None) or 0


def local_rank(env: Mapping[str, str]) -> int | None:
    """The process's number on its node, for the choice of a GPU; None where nothing says so."""
    kind = launcher(env)
    return _number(env, _NAMES[kind].local_rank) if kind else None


def local_size(env: Mapping[str, str]) -> int | None:
    """How many processes of the job are on this node; None where nothing says so."""
    kind = launcher(env)
    if kind == SRUN:
        per_node = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        node = _number(env, "SLURM_NODEID")
        return per_node[node] if node is not None and node < len(per_node) else None
    return _number(env, _NAMES[kind].local_size) if kind else None


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form written out; [] for a text of another form.

    >>> tasks_per_node("6,1(x2)")
    [6, 1, 1]
    """
    counts: list[int] = []
    for part in text.split(","):
        count, _, repeat = part.partition("(x")
        repeat = repeat.rstrip(")") or "1"
        if not (count.isdecimal() and repeat.isdecimal()):
            return []
        counts += [int(count)] * int(repeat)
    return counts


def node_name(env: Mapping[str, str]) -> str:
    """The node's name: Slurm's own where there is one, else the host's."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def check_alone(comm_size: int, env: Mapping[str, str], vendor: str) -> None:
    """Raise AloneError when MPI says one process and the launcher more.

    vendor: name of the MPI library, such as "MPICH" or "Open MPI". HPCMOE_ALONE=1 in the
    environment says that one process is meant (a shell inside a job step, for instance).
    """
    launched = launched_size(env)
    if comm_size != 1 or launched is None or launched.size <= 1 or env.get("HPCMOE_ALONE") == "1":
        return
    raise AloneError(f"{launched.source} = {launched.size}, but {vendor} finds a world of size 1: each process "
                     f"would run the whole job by itself. {cure(env, vendor)}")


def cure(env: Mapping[str, str], vendor: str) -> str:
    """What to start the job with instead, for this launcher and this MPI."""
    mine = os.path.join(sys.prefix, "bin", "mpiexec")
    mine = mine if os.path.exists(mine) else f"the mpiexec of {vendor}"
    kind = launcher(env)
    if kind == SRUN:
        wanted = {"Open MPI": "pmix", "MPICH": "pmi2"}.get(vendor)
        given = env.get("SLURM_MPI_TYPE") or "none"
        if wanted is None or given == wanted:
            return (f"srun ran with --mpi={given}, which this {vendor} does not join. Try another of the kinds "
                    f"that `srun --mpi=list` shows, or start with {mine} inside the allocation.")
        return (f"srun ran with --mpi={given}, and {vendor} needs srun --mpi={wanted}; "
                f"or start with {mine} inside the allocation.")
    if kind == OTHER:
        return f"Start with the launcher that belongs to {vendor}, such as {mine}."
    return f"The {kind} started them, but mpi4py uses {vendor}: start with {mine}."
