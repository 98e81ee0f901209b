"""The job scripts on one machine: what they start, what they refuse, and when they call a job complete."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from local import choices
from mpi import ROOT, environment
from tiny import tiny_job

SCRIPTS = sorted([*ROOT.glob("jobs/*.s*"), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return tiny_job(tmp_path_factory.mktemp("jobs"))


def bash(command: str, timeout=120, path=None, **env) -> subprocess.CompletedProcess:
    """A shell command in the checkout, with this interpreter's environment and its MPI."""
    env = environment({"HPCMOE_VENV": sys.prefix, **({"PATH": path} if path else {}), **env})
    del env["OMP_NUM_THREADS"], env["OPENBLAS_NUM_THREADS"]
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def common(command: str, **env) -> subprocess.CompletedProcess:
    return bash(f"set -euo pipefail; . jobs/common.sh; {command}", **env)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_syntax(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""


def test_sbatch_scripts_have_the_same_options():
    options = [[line.split("=")[0] for line in (ROOT / "jobs" / name).read_text().splitlines() if "=${" in line and line[0] != " "]
               for name in ("cpu_16.sbatch", "large_ep_64.sbatch", "baseline_16.sbatch", "mpirun.sh")]
    assert options[0] == ["JOB", "OUT", "RANKS", "LAYOUT", "LAUNCH", "MPI_TYPE", "export OMP_NUM_THREADS"]
    assert options[1] == options[2] == options[0][:6] + ["HPCMOE_DEVICE", "MODULES", "GPU_BIND"] + options[0][6:]
    assert options[3] == options[0][:4]


def test_gpu_scripts_ask_for_as_many_tasks_as_they_start():
    """Nodes x tasks per node, one GPU each, is the number of ranks, and of the layout's places."""
    for name, ranks in (("large_ep_64.sbatch", 64), ("baseline_16.sbatch", 16)):
        text = (ROOT / "jobs" / name).read_text()
        asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
        pp, ep, tp = (int(n or 1) for n in re.search(r'^LAYOUT=.*"pp=(\d+) ep=(\d+)(?: tp=(\d+))?"}', text, re.MULTILINE).groups())
        assert int(asked["nodes"]) * int(asked["ntasks-per-node"]) == ranks == pp * ep * tp
        assert asked["gpus-per-task"] == "1" and f"RANKS:-{ranks}" in text


SEES = 'echo "$(env | grep -E "^SLURM_(GPU|TRES)" | grep -v ON_NODE | sort | tr "\n" " ")"'


@pytest.mark.parametrize("env, expected", [
    ({}, ""),  # no GPUs were asked for
    ({"SLURM_GPUS_PER_NODE": "4"}, "SLURM_GPUS_PER_NODE=4"),  # all ranks see them as it is
    ({"SLURM_GPUS_PER_TASK": "1", "SLURM_TRES_PER_TASK": "gres/gpu:1", "SLURM_GPUS_ON_NODE": "4"}, "SLURM_GPUS_PER_NODE=4"),
    ({"SLURM_GPUS_PER_TASK": "1", "GPU_BIND": "per_task:1"}, "SLURM_GPUS_PER_TASK=1 SLURM_GPU_BIND=per_task:1"),
])
def test_what_ranks_see_of_the_gpus(env, expected):
    done = common(f"hm_gpus; {SEES}", **{"GPU_BIND": "all", **env})
    assert done.stdout.strip() == expected, done.stderr


def test_modules_are_loaded(tmp_path):
    """`module` is a shell function that may look at variables that are not set; what comes next needs no environment."""
    for name in ("large_ep_64.sbatch", "baseline_16.sbatch"):
        done = bash(f'module() {{ echo "module $* $UNSET"; }}; export -f module; MODULES="cuda mpi" bash jobs/{name}', SLURM_JOB_ID="1",
                    HPCMOE_VENV=str(tmp_path / "none"))
        assert done.stdout.strip() == "module load cuda mpi" and "bash jobs/setup.sh" in done.stderr, done.stderr


@pytest.mark.parametrize("extra", ["cuda11", "cuda12,cuda13", "-h"])
def test_setup_refuses_other_extras(extra):
    done = bash(f"bash jobs/setup.sh {extra}")
    assert done.returncode == 1 and f"not '{extra}'" in done.stderr


@pytest.mark.mpi
@pytest.mark.parametrize("ranks, layout, expected", [("4", "", (1, 4)), ("8", "pp=2 ep=4", (2, 4))])
def test_mpirun(job, tmp_path, ranks, layout, expected):
    done = bash("bash jobs/mpirun.sh --set sampling.max_tokens=3", JOB=str(job), OUT=str(tmp_path / "out"), RANKS=ranks, LAYOUT=layout)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "out" / "report.json").read_text())["run"]
    assert (run["layout"]["pp"], run["layout"]["ep"]) == expected
    assert run["threads"] == max(1, len(os.sched_getaffinity(0)) // int(ranks))


@pytest.mark.mpi
def test_the_papers_two_layouts_side_by_side(tmp_path):
    """The same work in both: the same tokens, on 16 and 64 ranks, with what each sent per token."""
    done = bash("bash jobs/compare_paper.sh", OUT=str(tmp_path), SEQUENCES="16", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {name: json.loads((tmp_path / name / "report.json").read_text()) for name in ("baseline", "proposal")}
    assert runs["baseline"]["run"]["layout"] == {"dp": 1, "pp": 2, "ep": 1, "tp": 8} and runs["baseline"]["run"]["ranks"] == 16
    assert runs["proposal"]["run"]["layout"] == {"dp": 1, "pp": 4, "ep": 16, "tp": 1} and runs["proposal"]["run"]["ranks"] == 64
    assert len({r["total_num_tokens"] for r in runs.values()}) == 1
    for words in ("parallel efficiency, output", "sent per token", "What it cannot show:\nspeed"):
        assert words in done.stdout
    texts = [[c["token_ids"] for c in choices(map(json.loads, open(tmp_path / name / "outputs.jsonl")))] for name in runs]
    assert texts[0] == texts[1] and len(texts[0]) == 16


@pytest.mark.mpi
def test_mpirun_says_that_a_job_did_not_complete(job, tmp_path):
    done = bash("bash jobs/mpirun.sh", JOB=str(job), OUT=str(tmp_path / "out"), RANKS="4", HPCMOE_FAIL="rank=1,step=1")
    assert done.returncode != 0
    assert done.stderr.count("HPCMOE_FAIL asked for this (rank 1 on ") == 1
    assert "the job did not complete" in done.stderr


def test_no_report_means_failure_whatever_the_launcher_says(tmp_path):
    report = tmp_path / "report.json"
    done = common(f"hm_checked {tmp_path} true")
    assert done.returncode == 1 and f"there is no {report}" in done.stderr
    report.write_text("{}")  # of an earlier run
    assert common(f"hm_checked {tmp_path} true").returncode == 1
    assert not report.exists()
    assert common(f"hm_checked {tmp_path} sh -c 'echo {{}} >{report}'").returncode == 0
    assert common(f"hm_checked {tmp_path} sh -c 'echo {{}} >{report}; exit 3'").returncode == 3


def test_a_launcher_that_does_not_end_is_ended(tmp_path):
    """As Open MPI's mpirun now and then does after its ranks have ended."""
    begin = time.monotonic()
    done = common(f"export HM_END_S=1; hm_checked {tmp_path} sh -c 'echo {{}} >{tmp_path}/report.json; exec sleep 100'")
    assert done.returncode == 0 and "its launcher did not end within 1 s" in done.stderr
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("ranks", ["0", "x", "-4", "1.5"])
def test_demo_refuses_nonsense(ranks):
    done = bash(f"bash jobs/demo.sh {ranks}")
    assert done.returncode == 1 and done.stderr.startswith("ERROR: usage: bash jobs/demo.sh")


def fake(folder: Path, name: str, text: str) -> str:
    """A program for the front of PATH; the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


@pytest.mark.parametrize("python, words", [
    ('case "$2" in *version_info*) exit 1;; esac', "no Python >= 3.10"),
    ('case "$2" in *ensurepip*) exit 1;; esac', "apt-get install python3-venv"),
])
def test_python_that_cannot_be_used(tmp_path, python, words):
    path = fake(tmp_path / "bin", "fakepython", python)
    done = common("hm_python", path=path, HPCMOE_PYTHON="fakepython")
    assert done.returncode == 1 and words in done.stderr and done.stderr.startswith("ERROR: ")


def test_package_index_out_of_reach(tmp_path):
    """pip's own last words, the log, and a hint; and the environment is not taken for complete."""
    venv = tmp_path / "venv"
    env = {"HPCMOE_VENV": str(venv), "HPCMOE_MPI": "mpich", "HPCMOE_PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "",
           "PIP_CONFIG_FILE": "/dev/null"}
    done = common("hm_setup text,cpu", **env)
    assert done.returncode == 1
    assert "ERROR: pip could not install" in done.stderr and str(venv / "pip.log") in done.stderr
    assert not (venv / ".hpcmoe-stamp").exists()


def test_no_environment_to_be_found(tmp_path):
    done = common("hm_find", HPCMOE_VENV=str(tmp_path / "none"))
    assert done.returncode == 1 and "bash jobs/setup.sh" in done.stderr


def test_environment_without_the_program(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    done = common("hm_setup text,cpu", HPCMOE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1 and "hpcmoe is not installed in HPCMOE_VENV=" in done.stderr


def test_unknown_mpi(tmp_path):
    done = common("hm_setup text,cpu", HPCMOE_VENV=str(tmp_path / "none"), HPCMOE_MPI="lam")
    assert done.returncode == 1 and "HPCMOE_MPI=lam: expected mpich, openmpi or site" in done.stderr


def test_site_mpi_that_is_not_there(tmp_path):
    if any(Path(folder, name).exists() for folder in ("/usr/bin", "/bin") for name in ("mpiexec", "mpirun")):
        pytest.skip("this machine has an MPI in /usr/bin")
    done = common("hm_setup text,cpu", path="/usr/bin:/bin", HPCMOE_VENV=str(tmp_path / "none"), HPCMOE_MPI="site")
    assert done.returncode == 1 and "load the site's MPI module" in done.stderr


def test_an_environment_is_current_for_fewer_extras_only(tmp_path):
    """What a second run finds: the same settings, and extras that are all there."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    ask = "; ".join(f"hm_current {venv} {kind} {extras} && echo yes || echo no" for kind, extras in
                    (("mpich", "text,cpu"), ("mpich", "text"), ("mpich", "text,plot"), ("openmpi", "text")))
    done = common(f"echo \"$(hm_hash mpich) mpich text,cpu\" >{venv}/.hpcmoe-stamp; {ask}", HPCMOE_VENV="")
    assert done.stdout.split() == ["yes", "yes", "no", "no"], done.stderr


@pytest.mark.mpi
def test_srun_command(tmp_path):
    """The kind of PMI follows the MPI unless the user names one; a failed rank ends the step."""
    path = fake(tmp_path / "bin", "srun", 'echo "$@"')
    from mpi import vendor
    kind = {"Open MPI": "pmix"}.get(vendor(), "pmi2")
    for env, expected in (({}, f"-K --mpi={kind} -n 4 program"), ({"MPI_TYPE": "cray_shasta"}, "-K --mpi=cray_shasta -n 4 program")):
        done = common("hm_find; hm_srun 4 program", path=path, **env)
        assert done.stdout.strip() == expected, done.stderr
    done = common("hm_find; SLURM_CPUS_PER_TASK=8 hm_srun 4 program", path=path)
    assert done.stdout.strip() == f"-K --mpi={kind} -n 4 --cpus-per-task=8 program"
