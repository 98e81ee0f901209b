"""What the simulator says of a run that has just ended, for its report: on rank 0, from the same configuration, the real lengths of requests
and the real load of experts. Nothing that goes wrong here may cost the run anything: the report then says why there is no prediction."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from hpcmoe.cluster.clusterfile import ClusterFile, read_cluster
from hpcmoe.cluster.kernels import Calibration, find_calibration, read_calibration
from hpcmoe.config import JobConfig
from hpcmoe.doctor import processor
from hpcmoe.errors import UserError
from hpcmoe.report import metrics
from hpcmoe.report.predicted import predicted
from hpcmoe.simulate.facts import simulated_facts
from hpcmoe.simulate.run import Told, simulate

ENVIRONMENT = "HPCMOE_CLUSTER"
OP_S, LEAST_S, MOST_SHARE = 100e-6, 3.0, 0.02  # of an op in the simulator; a prediction may cost this much, or this part of the run


def cluster_path(job: JobConfig) -> str:
    """The file of the cluster that a run is on, "" where none is named: run.cluster, or else the environment's."""
    return job.run.cluster or os.environ.get(ENVIRONMENT, "")


def read(path: str) -> tuple[ClusterFile, Calibration]:
    """A cluster file and the calibration that it names. Raises UserError."""
    cluster = read_cluster(path, simulate=True)
    return cluster, read_calibration(find_calibration(cluster.calibration, path))


def predict(session, report: dict) -> dict | None:
    """The section `predicted` of the report of a Session that has ended; None where no cluster is named."""
    path = cluster_path(session.job)
    if not path:
        return None
    found = {"cluster_file": path, "reason": None, "warnings": []}
    try:
        cluster, calibration = read(path)
        found |= {"cluster": cluster.name, "calibration": calibration.machine, "warnings": _warnings(session, cluster, calibration)}
        told = _told(session, report, cluster, calibration)
        _check_cost(session, told)
        done = simulate(told)
        return found | predicted(report, metrics.metrics(done.records, simulated_facts(done, path)))
    except UserError as error:
        return found | {"reason": str(error)}
    except Exception as error:  # pylint: disable=broad-except
        return found | {"reason": f"the simulation failed: {type(error).__name__}: {error}"}


def _warnings(session, cluster: ClusterFile, calibration: Calibration) -> list[str]:
    """Where the calibration is not of this machine."""
    mine = session.machine.words if session.machine.device.kind == "gpu" else processor()
    if not calibration.processor:
        return [f"the calibration of {cluster.name!r} does not say of which processor it is (it was made for {calibration.machine!r}); this is {mine}"]
    if calibration.processor not in mine:
        return [f"the calibration of {cluster.name!r} is of another machine: {calibration.processor}; this is {mine}"]
    return []


def _told(session, report: dict, cluster: ClusterFile, calibration: Calibration) -> Told:
    """The run as a simulation is told of it: what was left open is as the run chose it."""
    job, layout, model = session.job, session.layout, session.model
    transport = session.world.transport
    if job.task == "score" or job.run.capacity_factor or job.run.rebalance_every:
        raise UserError("not predicted: the task score, a capacity factor and rebalancing are not modelled")
    if (session.machine.dtype == "fp32") != (calibration.gemm.item_bytes == 4):
        raise UserError(f"not predicted: the run computes in {session.machine.dtype}, the calibration's products have {calibration.gemm.item_bytes} bytes")
    if session.machine.device.kind == "cpu" and session.machine.threads != 1:
        raise UserError(f"not predicted: a rank's products use {session.machine.threads} threads, the calibration is of one core; expected "
                        "OMP_NUM_THREADS=1 and OPENBLAS_NUM_THREADS=1")
    run = replace(job.run, transport=transport, micro_batches=session.cut.micros, lanes=session.cut.lanes,
                  device=session.machine.device.kind)
    chosen = replace(job.layout, dp=layout.dp, pp=layout.pp, ep=layout.ep, tp=layout.tp)
    requests = [q for q in sorted((q for r in session.records for q in r.requests), key=lambda q: q.index) if q.output_tokens]
    if not requests:
        raise UserError("not predicted: no token was generated")
    drawn = session.choices.sampling.temperature_n[[q.index for q in requests]] > 0
    rows_le = np.array([layer["rows_per_expert"] for layer in report["expert_load"]["layers"]], dtype=float)
    share_le = (rows_le + 1e-9) / (rows_le + 1e-9).sum(axis=1, keepdims=True)
    return Told(replace(job, run=run, layout=chosen), model, cluster, calibration, layout.size, [(q.prompt_tokens, q.output_tokens) for q in requests],
                share_le, "as in the run", [], float(np.mean(drawn)), tuple(session.world.node_of_rank))


def _check_cost(session, told: Told) -> None:
    """Raises UserError where the simulation would take long."""
    rounds = max(len(record.load) for record in session.records)
    programs = [len(program) for program in session.schedule.programs.values()]
    ops = rounds * (np.mean(programs) * told.gpus if told.cores() else sum(programs) * told.job.layout.dp)
    limit_s = max(LEAST_S, MOST_SHARE * max(record.run_s for record in session.records))
    if ops * OP_S > limit_s:
        raise UserError(f"not predicted: a simulation of {ops:,.0f} ops takes longer than {limit_s:.3g} s; hpcmoe simulate has no such limit")
