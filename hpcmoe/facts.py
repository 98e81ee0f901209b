"""What a run was, for its report: model, layout, versions, machine."""

from __future__ import annotations

import importlib.metadata
import platform

from mpi4py import MPI

from hpcmoe import placing
from hpcmoe.config import to_dict
from hpcmoe.parallel.replay import predicted_bubble


def version(name: str) -> str:
    """The installed version of a distribution, "-" where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def mpi_facts() -> dict:
    """Vendor and version of the MPI library in use, and its thread level."""
    vendor, numbers = MPI.get_vendor()
    level = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled", MPI.THREAD_SERIALIZED: "serialized",
             MPI.THREAD_MULTIPLE: "multiple"}[MPI.Query_thread()]
    return {"vendor": vendor, "version": ".".join(map(str, numbers)), "threads": level}


def job_facts(session, failed: int) -> dict:
    """The `facts` of report.metrics for a finished Session."""
    job, model, layout = session.job, session.model, session.layout
    return {
        "task": job.task,
        "layout": {"dp": layout.dp, "pp": layout.pp, "ep": layout.ep, "tp": layout.tp},
        "layout_reason": session.shared.why,
        "leaders": f"{layout.leaders} ({len(session.world.leaders)} per stage)",
        "schedule": {"name": session.schedule.name, "micro_batches": session.limits.micros, "lanes": session.limits.lanes},
        "lane_trial": session.lane_trial and session.lane_trial._asdict(),
        "transport": session.world.transport,
        "sequences_at_once": session.limits.slots * session.limits.micros * len(session.world.leaders) * layout.dp,
        "context_tokens": session.limits.context,
        "dtype": session.machine.dtype,
        "threads": session.machine.threads,
        "linear": dict(zip(("backend", "version"), session.machine.library)),
        "gpus": [record.device for record in session.records] if session.machine.device.kind == "gpu" else [],
        "gpu_work": session.compute.launched(),
        "mpi": mpi_facts(),
        "versions": {"hpcmoe": version("hpcmoe"), "python": platform.python_version(), "numpy": version("numpy"),
                     "mpi4py": version("mpi4py"), "h5py": version("h5py")},
        "model": {"file": job.weights.file, "family": model.family, "layers": model.layers, "experts": model.router.experts,
                  "top_k": model.router.top_k, "d": model.d, "f": model.expert.f, "vocab": model.vocab},
        "startup_s": session.startup_s,
        "weights_file_bytes": session.file_bytes,
        "errors": failed,
        "bubble_predicted_share": predicted_bubble(session.schedule, session.records),
        "placement": placing.placement_facts(job, session.shared.placement, layout, session.world.node_of_rank),
        "config": to_dict(job),
    }
