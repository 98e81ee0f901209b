"""The sbatch scripts on a real Slurm, with this environment's MPI: srun, mpirun, GPUs that are not there, and what goes wrong."""

import json
import os
import subprocess
import sys
import time

import pytest

from mpi import ROOT, environment, vendor
from tiny import tiny_job

BED = ROOT.parent / "shared" / "testbed" / "slurm"
PORT = "28817"
RIGHT = {"MPICH": "pmi2", "Open MPI": "pmix"}
WRONG = {"MPICH": ["none", "pmix"], "Open MPI": ["none", "pmi2"]}

pytestmark = [pytest.mark.mpi, pytest.mark.slurm]


def run(command: str, env=None, timeout=60) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment(env), capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def slurm():
    """A function that runs a shell command against a fresh Slurm of 4 nodes."""
    if not (BED / "start.sh").exists():
        pytest.skip(f"no Slurm test bed in {BED}")
    if vendor() not in RIGHT:
        pytest.skip(f"no known way to start {vendor()} here")
    bed = {"SLURMBED_DIR": f"/tmp/hpcmoe-slurm-{os.getpid()}", "SLURMBED_PORT": PORT,
           "SLURMBED_GPUS": "16" if os.getuid() == 0 else "0"}  # stand-ins, which only root can make
    started = run(f"{BED}/start.sh", bed, timeout=300)
    if "missing packages" in started.stderr:
        pytest.skip(started.stderr.strip())
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield lambda command, **env: run(f". {bed['SLURMBED_DIR']}/env.sh; {command}", env)
    finally:
        run(f"{BED}/stop.sh --purge", bed, timeout=120)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return tiny_job(tmp_path_factory.mktemp("slurm"))


def submit(slurm, tmp_path, job, script="jobs/cpu_16.sbatch", limit=150, **env) -> tuple[str, str, str]:
    """(state, log, exit code) of a script (and options before it) with these variables, once it has ended."""
    log = tmp_path / "log"
    env = {"JOB": str(job), "OUT": str(tmp_path / "out"), "HPCMOE_VENV": sys.prefix, **env}
    sent = slurm(f"sbatch --parsable --output={log} {script}", **env)
    assert sent.returncode == 0, sent.stderr
    number, end = sent.stdout.strip(), time.monotonic() + limit
    while True:
        words = slurm(f"scontrol show job -o {number}").stdout.split()
        shown = dict(word.split("=", 1) for word in words if "=" in word)
        if shown.get("JobState") not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            return shown["JobState"], log.read_text(), shown["ExitCode"]
        if time.monotonic() > end:
            slurm(f"scancel {number}")
            pytest.fail(f"job {number} {shown['JobState']} after {limit} s\n{log.read_text() if log.exists() else ''}")
        time.sleep(0.5)


def ours(log: str) -> list[str]:
    """The program's own messages of failure; progress and facts begin with other words."""
    return [line for line in log.splitlines() if line.startswith("hpcmoe: ") and
            not line.startswith(("hpcmoe: layout dp", "hpcmoe: exchange of", "hpcmoe: lanes for", "hpcmoe: weights loaded", "hpcmoe: outputs"))]


@pytest.mark.parametrize("launch", ["srun", "mpirun"])
def test_a_job_completes(slurm, tmp_path, job, launch):
    state, log, code = submit(slurm, tmp_path, job, LAUNCH=launch)
    assert (state, code) == ("COMPLETED", "0:0"), log
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["run"]["layout"] == {"dp": 1, "pp": 1, "ep": 16, "tp": 1}
    assert report["num_requests"] == 8
    assert report["run"]["mpi"]["vendor"] == vendor()
    assert len({rank["host"] for rank in report["per_rank"]}) == (4 if os.getuid() == 0 else 1), "16 ranks on 4 nodes"
    assert len((tmp_path / "out" / "outputs.jsonl").read_text().splitlines()) == 8
    assert ours(log) == []


@pytest.mark.parametrize("script, options, layout", [
    ("large_ep_64", "--nodes=4 --ntasks-per-node=16", {"dp": 1, "pp": 4, "ep": 16, "tp": 1}),
    ("baseline_16", "", {"dp": 1, "pp": 2, "ep": 1, "tp": 8}),
])
def test_gpu_scripts(slurm, tmp_path, job, script, options, layout):
    """On the 4 nodes here: each rank finds no GPU behind the numbers that Slurm gives it, and computes on a core."""
    ranks = layout["pp"] * layout["ep"] * layout["tp"]
    if vendor() != "MPICH" and ranks > 16:
        pytest.skip("64 ranks on Slurm are run with MPICH only")
    gpus = "" if os.getuid() == 0 else "--gpus-per-task=0"
    state, log, code = submit(slurm, tmp_path, job, f"{options} --cpus-per-task=1 {gpus} jobs/{script}.sbatch", limit=400)
    assert (state, code) == ("COMPLETED", "0:0"), log
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["run"]["layout"] == layout
    assert report["config"]["run"]["device"] == "auto"
    assert len(report["per_rank"]) == ranks
    assert ours(log) == []


def test_a_gpu_that_is_not_there(slurm, tmp_path, job):
    state, log, code = submit(slurm, tmp_path, job, "--cpus-per-task=1 jobs/baseline_16.sbatch", HPCMOE_DEVICE="gpu")
    assert state == "FAILED" and code != "0:0"
    assert len(ours(log)) == 1 and "run.device = 'gpu'" in ours(log)[0], log


SHOW = """#!/bin/bash
cd {root}; . jobs/common.sh; hm_find; hm_gpus
for start in hm_srun hm_run; do
  mkdir -p {out}/$start
  HM_END_S=30 hm_checked {out}/$start $start 8 bash -c 'echo "$0 $(hostname) $CUDA_VISIBLE_DEVICES" | tee -a {out}/$1/report.json' $start $start
done
"""


@pytest.mark.parametrize("bind, srun, mpirun", [("all", ["0,1"] * 8, ["0,1"] * 8), ("per_task:1", ["0", "1"] * 4, None)])
def test_what_ranks_see(slurm, tmp_path, bind, srun, mpirun):
    """Asked for by the task: all GPUs of the job on the node, by either starter; or each rank its own."""
    if os.getuid():
        pytest.skip("only root can make stand-ins for GPUs")
    script = tmp_path / "show.sbatch"
    script.write_text(SHOW.format(root=ROOT, out=tmp_path))
    options = "--nodes=4 --ntasks-per-node=2 --gpus-per-task=1 --cpus-per-task=1"
    _, log, _ = submit(slurm, tmp_path, "", f"{options} {script}", GPU_BIND=bind)
    seen = [line.split() for line in log.splitlines() if line.startswith("hm_")]
    assert sorted(words[2] for words in seen if words[0] == "hm_srun") == sorted(srun), log
    if mpirun:
        assert [words[2] for words in seen if words[0] == "hm_run"] == mpirun, log
        assert len({words[1] for words in seen}) == 4


@pytest.mark.parametrize("which", [0, 1])
def test_srun_with_the_wrong_kind_of_mpi(slurm, tmp_path, job, which):
    state, log, code = submit(slurm, tmp_path, job, MPI_TYPE=WRONG[vendor()][which])
    assert state == "FAILED" and code != "0:0"
    assert len(ours(log)) == 1, log
    assert f"{vendor()} needs srun --mpi={RIGHT[vendor()]}" in ours(log)[0]
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_killed_rank_ends_the_job(slurm, tmp_path, job):
    begin = time.monotonic()
    state, log, code = submit(slurm, tmp_path, job, HPCMOE_FAIL="rank=5,step=1,how=kill")
    assert state == "FAILED" and code != "0:0"
    assert "the job did not complete" in log
    assert not (tmp_path / "out" / "report.json").exists()
    assert not (tmp_path / "out" / "outputs.jsonl").exists()
    assert time.monotonic() - begin < 60


def test_an_exception_on_one_rank_ends_the_job(slurm, tmp_path, job):
    state, log, code = submit(slurm, tmp_path, job, HPCMOE_FAIL="rank=5,step=1")
    assert state == "FAILED" and code != "0:0"
    assert log.count("internal error: RuntimeError: HPCMOE_FAIL asked for this (rank 5 on n2)") == 1, log
    assert len(ours(log)) == 1, log
    assert not (tmp_path / "out" / "report.json").exists()
