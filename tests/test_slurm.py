"""jobs/cpu_16.sbatch on a real Slurm, with this environment's MPI: srun, mpirun, and what goes wrong."""

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
            not line.startswith(("hpcmoe: layout dp", "hpcmoe: weights loaded", "hpcmoe: outputs"))]


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


def test_64_ranks_in_four_stages(slurm, tmp_path, job):
    """The GPU script, squeezed into 4 nodes: each rank finds no GPU behind the numbers that Slurm gives it."""
    if vendor() != "MPICH":
        pytest.skip("64 ranks on Slurm are run with MPICH only")
    gpus = "--gpus-per-node=16" if os.getuid() == 0 else "--gpus-per-node=0"
    script = f"--nodes=4 --ntasks-per-node=16 --cpus-per-task=1 {gpus} jobs/large_ep_64.sbatch"
    state, log, code = submit(slurm, tmp_path, job, script, limit=400)
    assert (state, code) == ("COMPLETED", "0:0"), log
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["run"]["layout"] == {"dp": 1, "pp": 4, "ep": 16, "tp": 1}
    assert len(report["per_rank"]) == 64
    assert ours(log) == []


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
