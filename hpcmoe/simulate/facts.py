"""What a simulation was, for its report: the facts that a run's report has, and what is said of simulations alone."""

from __future__ import annotations

import importlib.metadata
import platform

from hpcmoe import placing
from hpcmoe.config import to_dict
from hpcmoe.parallel.replay import predicted_bubble


def simulated_facts(done, cluster_path: str) -> dict:
    """The `facts` of report.metrics for a run.Simulated."""
    told, layout, schedule, sizes = done.told, done.layout, done.schedule, done.sizes
    model, c = told.model, told.calibration
    return {
        "task": told.job.task,
        "simulated": _simulated(done, cluster_path),
        "layout": {"dp": layout.dp, "pp": layout.pp, "ep": layout.ep, "tp": layout.tp},
        "layout_reason": done.why,
        "leaders": f"{layout.leaders} ({done.leaders} per stage)",
        "schedule": {"name": schedule.name, "micro_batches": schedule.micros, "lanes": schedule.lanes},
        "lane_trial": None,
        "transport": "hierarchical" if done.hierarchical else "staged" if told.job.run.transport == "staged" else "flat",
        "sequences_at_once": sizes.slots * sizes.micros * done.leaders * layout.dp,
        "context_tokens": sizes.context,
        "dtype": "fp32" if c.gemm.item_bytes == 4 else "bf16" if told.job.weights.dtype == "auto" else told.job.weights.dtype,
        "threads": 1,
        "linear": {"backend": "calibration", "version": c.machine},
        "gpus": [],
        "gpu_work": {},
        "mpi": {"vendor": "none", "version": "simulated", "threads": "-"},
        "versions": {"hpcmoe": importlib.metadata.version("hpcmoe"), "python": platform.python_version()},
        "model": {"file": told.job.weights.file, "family": model.family, "layers": model.layers, "experts": model.router.experts,
                  "top_k": model.router.top_k, "d": model.d, "f": model.expert.f, "vocab": model.vocab},
        "startup_s": 0.0,
        "weights_file_bytes": None,
        "errors": 0,
        "bubble_predicted_share": predicted_bubble(schedule, done.records),
        "placement": placing.placement_facts(told.job, placing.placement_of(told.job, model, layout), layout, done.network.node_r.tolist()),
        "config": to_dict(told.job),
    }


def _simulated(done, cluster_path: str) -> dict:
    told, elapsed = done.told, max(r.run_s for r in done.records)
    output = sum(q.output_tokens for r in done.records for q in r.requests)
    rank = max(r.weights_bytes + r.kv_bytes + r.buffer_bytes for r in done.records)
    return {"cluster": told.cluster.name, "cluster_file": cluster_path, "calibration": told.calibration.machine,
            "calibration_source": told.calibration.source, "load": told.load, "warnings": told.warnings,
            "transport_trial": done.trial and done.trial._asdict(),
            "gpu_s_per_million_output_tokens": told.gpus * elapsed / output * 1e6 if output else None,
            "busiest_link": _busiest(done, elapsed), "memory_bytes": int(told.cluster.rank.memory_gib * 2**30), "memory_used_max_bytes": rank}


def _busiest(done, elapsed: float) -> dict:
    """The link that is busy for the largest part of the run, if messages came at its rate."""
    load_l = sum((count * leg.load_l for group in done.groups for counted in group.moved.values() for moved, count in counted.values()
                  for leg in moved.legs if leg.load_l is not None), 0 * done.network.bandwidth_l)
    found = done.network.busiest(load_l)
    return {"kind": found.kind, "number": found.number, "nbytes": found.nbytes, "busy_s": found.seconds,
            "busy_share": found.seconds / elapsed if elapsed else None}
