"""hpcmoe doctor: alone, on ranks, on machines that lack something."""

import json
import subprocess
import sys

import pytest

from hpcmoe.doctor import Check, cpu, merge
from mpi import environment, run_ranks, vendor


def doctor(*arguments, env=None, before=""):
    code = f"import sys; {before}\nfrom hpcmoe.cli import main\nsys.exit(main(['doctor', *sys.argv[1:]]))"
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment(env), capture_output=True, text=True, timeout=120)


def test_alone():
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A run could start here." in done.stdout
    for name in ("MPI ", "threads in MPI", "transports", "HDF5", "CPU features", "memory", "GPUs", "threads per rank  ", "BLAS"):
        assert name in done.stdout, name
    assert vendor() in done.stdout


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_answer_once_in_json(ranks):
    done = run_ranks(ranks, ["-m", "hpcmoe", "doctor", "--json"]).check()
    found = json.loads(done.out)
    values = {check["name"]: check["value"] for check in found["checks"]}
    assert found["ok"] and not any(check["problem"] for check in found["checks"])
    assert values["ranks"].startswith(f"{ranks} on 1 node: ")
    assert values["ranks sharing memory"] == str(ranks)
    assert values["threads in MPI"] == "multiple"
    assert values["threads per rank"] == "1 (OPENBLAS_NUM_THREADS)"
    for transport in ("ialltoallv", "pairwise", "staged"):
        assert transport in values["transports"]
    assert values["MPI"].startswith(vendor())


@pytest.mark.parametrize("before, env, name, problem", [
    ("", {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}, "MPI", "no MPI library that mpi4py can load"),
    ("sys.modules['h5py'] = None", {}, "HDF5", "h5py does not import"),
    ("", {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "MPI", "a world of size 1"),
])
def test_a_run_could_not_start(before, env, name, problem):
    done = doctor("--json", before=before, env=env)
    assert done.returncode == 2, done.stderr
    found = json.loads(done.stdout)
    assert not found["ok"]
    bad = [check for check in found["checks"] if check["problem"]]
    assert [check["name"] for check in bad] == [name]
    assert problem in bad[0]["problem"]
    assert "Traceback" not in done.stderr


def test_what_may_be_missing():
    done = doctor(before="sys.modules['tokenizers'] = sys.modules['jinja2'] = sys.modules['cupy'] = None")
    assert done.returncode == 0
    assert "missing; text prompts need hpcmoe[text]" in done.stdout
    assert "missing; chat messages need hpcmoe[text]" in done.stdout


def test_lonely_ranks_other_than_the_first_say_nothing():
    done = doctor(env={"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_problem_is_printed_in_the_table():
    done = doctor(env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    assert done.returncode == 2
    assert "PROBLEM, MPI: no MPI library" in done.stdout and "A run could not start here." in done.stdout


def test_merge():
    def ranks(*values, name="CPU"):
        return [{name: Check(name, value)} for value in values]
    assert merge(ranks("a", "a", "a")) == [Check("CPU", "a")]
    assert merge(ranks("a", "b", "a")) == [Check("CPU", "rank 0: a; rank 1: b")]
    assert merge(ranks("1.0", "1.0", "2.0", name="NumPy"))[0].problem == "NumPy differs between ranks"
    assert merge(ranks("16.0 GB, 9.5 GB free", "16.0 GB, 12.0 GB free", name="memory"))[0].value == "16.0 GB, 9.5 GB free"
    faulty = [{"HDF5": Check("HDF5", "2.0")}, {"HDF5": Check("HDF5", "missing", "does not import")}]
    assert merge(faulty)[0].problem == "does not import"


def test_cpu():
    model, flags = cpu()
    assert model and flags
    with open("/proc/cpuinfo") as file:
        text = file.read()
    assert model in text or "model name" not in text
    assert all(flag in text for flag in flags)
