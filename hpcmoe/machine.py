"""The machine that a rank computes on: its CPU, or one GPU that no other rank should have to share."""

from __future__ import annotations

import os
from typing import Callable

from hpcmoe import affinity
from hpcmoe.compute.host import Host
from hpcmoe.config import JobConfig
from hpcmoe.device import cupy_status, gpus
from hpcmoe.errors import UserError, at
from hpcmoe.parallel.world import agree


def open_machine(comm, job: JobConfig, hosts: list[str], say: Callable[[str], None]):
    """A Host or a GpuMachine for every rank of `comm`; all have the same kind.

    hosts: the node of each rank. Raises AgreedError where a GPU is asked for and a rank has none.
    """
    visible = [] if job.run.device == "cpu" else gpus()
    counts = comm.allgather(len(visible))
    if job.run.device == "cpu" or (job.run.device == "auto" and min(counts) == 0):
        if max(counts):
            say(f"rank {counts.index(0)} sees no GPU, others do: all compute on CPUs (run.device = gpu makes this an error)")
        return agree(comm, Host, job.weights)
    return agree(comm, _open_gpu, comm, job, hosts, visible, say)


def _open_gpu(comm, job: JobConfig, hosts: list[str], visible: list, say):
    everyone = list(zip(hosts, comm.allgather(affinity.seen(visible, os.environ))))
    if not visible:
        raise UserError(f"job: run.device = 'gpu': {cupy_status()[1]}; {affinity.no_gpu(os.environ)}")
    if not all(seen.gpus for _, seen in everyone):
        raise UserError(f"job: run.device = 'gpu': a rank of this job sees no GPU: {affinity.no_gpu(os.environ)}")
    if job.run.capacity_factor:
        raise at("job", "run.capacity_factor", job.run.capacity_factor, "0 on a GPU: rows are limited only on CPUs in this version "
                 "(run.device = cpu)")
    if job.weights.dtype == "fp32":
        raise at("job", "weights.dtype", "fp32", "fp16, bf16 or auto on a GPU (run.device = cpu computes in fp32)")
    choice = affinity.place_here(everyone, comm.rank, os.environ)
    for warning in dict.fromkeys(w for warnings in comm.allgather(choice.warnings) for w in warnings):
        say(warning)
    from hpcmoe.compute.gpu import GpuMachine  # kernels and CuPy: where they are used
    gpu = next(gpu for gpu in visible if gpu.index == choice.index)
    here = (hosts[comm.rank], gpu.pci)
    sharing = comm.allgather(here).count(here)
    return GpuMachine(choice.index, job.weights, f"{gpu.name}, {affinity.words(gpu, choice.nic)}, {choice.why}", sharing)
