"""What the launcher's environment says, and how ranks end: once told, all gone, the right exit code."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hpcmoe.environment import (HYDRA, MPIRUN, OTHER, SRUN, AloneError, check_alone, env_rank, launched_many,
                                launched_size, launcher, local_rank, local_size, node_name, tasks_per_node)
from mpi import ROOT, alive, descendants, environment, kill_group, run_ranks, start_ranks, vendor

ENDINGS = str(ROOT / "tests" / "programs" / "endings.py")

# As seen on a cluster of 2 nodes with 7 and 1 ranks; rank 5 is the sixth of the first node.
SLURM_STEP = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "5", "SLURM_NODEID": "0",
              "SLURM_STEP_TASKS_PER_NODE": "7,1", "SLURM_NTASKS": "8", "SLURMD_NODENAME": "n1"}
HYDRA_RANK = {"PMI_SIZE": "8", "PMI_RANK": "5", "MPI_LOCALRANKID": "5", "MPI_LOCALNRANKS": "7", "HYDI_CONTROL_FD": "9"}
MPIRUN_RANK = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "5",
               "OMPI_COMM_WORLD_LOCAL_SIZE": "7", "PMIX_RANK": "5"}
PROXY_STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2",
              "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "0"}
BATCH = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "7,1"}
PMIX = {"PMIX_RANK": "5", "SLURM_MPI_TYPE": "pmix"}
PMI2 = {"PMI_SIZE": "8", "PMI_RANK": "5", "PMI_FD": "21", "PMI_JOBID": "7.0", "SLURM_MPI_TYPE": "pmi2"}


@pytest.mark.parametrize("env, kind, size, rank, local", [
    ({}, None, None, 0, (None, None)),
    (BATCH, None, None, 0, (None, None)),
    (SLURM_STEP, SRUN, 8, 5, (5, 7)),
    (SLURM_STEP | PMI2, SRUN, 8, 5, (5, 7)),
    (SLURM_STEP | PMIX, SRUN, 8, 5, (5, 7)),
    (HYDRA_RANK, HYDRA, 8, 5, (5, 7)),
    (HYDRA_RANK | PROXY_STEP, HYDRA, 8, 5, (5, 7)),
    (MPIRUN_RANK, MPIRUN, 8, 5, (5, 7)),
    (MPIRUN_RANK | BATCH, MPIRUN, 8, 5, (5, 7)),
    (MPIRUN_RANK | PROXY_STEP, MPIRUN, 8, 5, (5, 7)),
    ({"PMI_SIZE": "8", "PMI_RANK": "5", "PALS_LOCAL_RANKID": "5", "PALS_LOCAL_SIZE": "7"}, OTHER, 8, 5, (5, 7)),
    ({"PMI_SIZE": "8", "PMI_RANK": "5"}, OTHER, 8, 5, (None, None)),
    (SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "many"}, SRUN, None, 5, (5, 7)),
], ids=range(13))
def test_environment(env, kind, size, rank, local):
    assert launcher(env) == kind
    found = launched_size(env)
    assert (found and found.size) == size
    assert env_rank(env) == rank
    assert (local_rank(env), local_size(env)) == local
    assert launched_many(env) == (size is not None and size > 1)


@pytest.mark.parametrize("text, counts", [("4", [4]), ("6,1(x2)", [6, 1, 1]), ("2(x3),1", [2, 2, 2, 1]), ("", []), ("a(x2)", [])])
def test_tasks_per_node(text, counts):
    assert tasks_per_node(text) == counts


def test_node_name():
    assert node_name({"SLURMD_NODENAME": "n3"}) == "n3"
    assert node_name({}) == os.uname().nodename


@pytest.mark.parametrize("env", [{}, BATCH, SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "1"}, SLURM_STEP | {"HPCMOE_ALONE": "1"}])
def test_one_process_is_meant(env):
    check_alone(1, env, "MPICH")


@pytest.mark.parametrize("env", [SLURM_STEP, HYDRA_RANK | PROXY_STEP, MPIRUN_RANK])
def test_a_whole_world_passes(env):
    check_alone(8, env, "MPICH")


@pytest.mark.parametrize("env, mpi, words", [
    (SLURM_STEP, "MPICH", ["SLURM_STEP_NUM_TASKS = 8", "--mpi=none", "srun --mpi=pmi2"]),
    (SLURM_STEP, "Open MPI", ["--mpi=none", "srun --mpi=pmix"]),
    (SLURM_STEP | PMI2, "Open MPI", ["--mpi=pmi2", "srun --mpi=pmix"]),
    (SLURM_STEP | PMIX, "MPICH", ["--mpi=pmix", "srun --mpi=pmi2"]),
    (SLURM_STEP | PMI2, "MPICH", ["--mpi=pmi2", "srun --mpi=list"]),
    (HYDRA_RANK, "Open MPI", ["PMI_SIZE = 8", "mpiexec of MPICH started them", "mpi4py uses Open MPI"]),
    (MPIRUN_RANK, "MPICH", ["OMPI_COMM_WORLD_SIZE = 8", "mpirun of Open MPI started them", "mpi4py uses MPICH"]),
    ({"PMI_SIZE": "8", "PMI_RANK": "5"}, "Open MPI", ["PMI_SIZE = 8", "the launcher that belongs to Open MPI"]),
])
def test_alone_is_refused_with_a_cure(env, mpi, words):
    with pytest.raises(AloneError) as caught:
        check_alone(1, env, mpi)
    for word in words:
        assert word in str(caught.value)


# ---------------------------------------------------------------- real ranks
@pytest.mark.mpi
def test_all_is_well():
    done = run_ranks(4, [ENDINGS, "well"]).check()
    assert sorted(done.out.split("\n")) == ["", *(f"rank {r} of 4" for r in range(4))]


@pytest.mark.mpi
@pytest.mark.parametrize("how, code, message", [
    ("user error before MPI", 2, "hpcmoe: no such file: a.toml\n"),
    ("agreed", 2, "hpcmoe: job.toml: run.lanes = 0: expected an integer >= 1\n"),
    ("user error everywhere", 2, "hpcmoe: no such file: a.toml\n"),
    ("internal error everywhere", 1, "hpcmoe: internal error: ValueError: bad value\n"),
    ("exit code", 1, None),
])
def test_all_ranks_fail_together(how, code, message):
    starter = ["-m", "mpi4py"] if how in ("agreed", "exit code") else []
    done = run_ranks(4, [*starter, ENDINGS, how])
    assert done.rc == code
    assert done.seconds < 10
    text = done.out + done.err
    assert message is None or text.count(message) == 1
    assert text.count("Traceback") == (how == "internal error everywhere")
    assert "Abort" not in text.replace("MPI_ABORT", "Abort"), "ranks that agree must leave without MPI_Abort"


@pytest.mark.mpi
def test_different_texts_are_both_shown():
    done = run_ranks(4, [ENDINGS, "two texts"])
    assert done.rc == 2
    assert done.err.count("no such file: a.toml") == 1 and done.err.count("no such file: b.toml") == 1


@pytest.mark.mpi
@pytest.mark.parametrize("how, code, message", [
    ("one rank before MPI", 2, "hpcmoe: no such file: a.toml (rank 1 on "),
    ("internal error", 1, "hpcmoe: internal error: ValueError: bad value (rank 1 on "),
    ("two ranks", 1, "hpcmoe: internal error: ValueError: bad value (rank "),
    ("disk full", 1, "hpcmoe: [Errno 28] No space left on device: 'out.part' (rank 1 on "),
    ("no memory", 1, "hpcmoe: out of memory: cannot allocate 7 GB (rank 1 on "),
])
def test_one_rank_fails_and_all_end(how, code, message):
    starter = ["-m", "mpi4py"] if how == "two ranks" else []
    done = run_ranks(4, [*starter, ENDINGS, how], timeout=30)
    assert done.rc is not None, "the other ranks hang"
    assert done.rc == code
    assert done.seconds < 10
    assert (done.out + done.err).count(message) == 1
    assert (done.out + done.err).count("hpcmoe: ") == 1
    assert done.err.count("Traceback") == ("internal error" in message)


@pytest.mark.mpi
def test_debug_shows_the_traceback_of_a_user_error():
    done = run_ranks(2, [ENDINGS, "agreed"], env={"HPCMOE_DEBUG": "1"})
    assert done.rc == 2 and done.err.count("Traceback") == 1


@pytest.mark.mpi
def test_a_rank_that_just_exits_ends_all():
    done = run_ranks(4, [ENDINGS, "exit"], timeout=30)
    assert done.rc not in (0, None) and done.seconds < 10


def waiting_ranks(count=4):
    """(Popen of mpiexec, pids of its ranks), once all wait inside MPI."""
    process = start_ranks(count, [ENDINGS, "wait"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    signal.alarm(90)  # a program that never starts must not hold up the tests
    assert process.stdout.readline() == "READY\n"
    time.sleep(0.3)
    ranks = [pid for pid in descendants(process.pid) if cmdline(pid)[-2:] == [ENDINGS, "wait"] and "mpiexec" not in cmdline(pid)[0]]
    return process, ranks


def cmdline(pid: int) -> list[str]:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read().split("\0")[:-1]


@pytest.mark.mpi
@pytest.mark.parametrize("to, number, message", [
    ("launcher", signal.SIGINT, "hpcmoe: interrupted\n"),
    ("launcher", signal.SIGTERM, "hpcmoe: ended by SIGTERM\n"),
    ("rank 1", signal.SIGTERM, "hpcmoe: ended by SIGTERM\n"),
    ("rank 1", signal.SIGKILL, None),
])
def test_signals_end_all_ranks_that_wait_inside_mpi(to, number, message):
    process, ranks = waiting_ranks()
    try:
        begin = time.monotonic()
        os.kill(process.pid if to == "launcher" else ranks[1], number)
        text, _ = process.communicate(timeout=20)
        while alive(ranks) and time.monotonic() < begin + 10:
            time.sleep(0.05)
        assert not alive(ranks)
        assert process.returncode != 0
        if vendor() == "Open MPI":
            message = None  # its mpirun passes nothing on once it was told to end, and reports a killed rank itself
        assert message is None or text.count(message) == 1
        assert "Traceback" not in text
    finally:
        kill_group(process)


@pytest.mark.mpi
def test_many_ranks_fail_with_one_message():
    done = run_ranks(16, [ENDINGS, "user error everywhere"])
    assert done.rc == 2 and (done.out + done.err).count("no such file") == 1


# ---------------------------------------------------------------- launcher and MPI do not fit
def run_alone(rank: int, env: dict):
    return subprocess.run([sys.executable, ENDINGS, "well"], env=environment(env), capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("rank", [0, 1])
def test_lonely_ranks_print_once(rank):
    env = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    done = run_alone(rank, env)
    assert done.returncode == 2
    assert done.stdout == "", "a copy of the job ran"
    assert done.stderr.count("hpcmoe: srun, SLURM_STEP_NUM_TASKS = 2, but") == (rank == 0)
    assert len(done.stderr.splitlines()) == (rank == 0)


@pytest.mark.mpi
def test_the_launcher_of_the_other_mpi():
    name = "HPCMOE_TEST_MPICH" if vendor() == "Open MPI" else "HPCMOE_TEST_OPENMPI"
    if name not in os.environ:
        pytest.skip(f"needs {name}, the environment of the other MPI: bash tests/run.sh sets it")
    other = os.path.join(os.environ[name], "bin", "mpiexec")
    flags = ["--oversubscribe"] if vendor() != "Open MPI" else []
    begin = time.monotonic()
    done = subprocess.run([other, *flags, "-n", "4", sys.executable, ENDINGS, "well"], env=environment(),
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert time.monotonic() - begin < 10
    assert done.stdout == "", "copies of the job ran"
    assert done.stderr.count("hpcmoe: ") == 1
    assert f"but mpi4py uses {vendor()}: start with" in done.stderr


def test_a_reader_that_has_had_enough(tmp_path):
    """`hpcmoe ... | head -1`: no traceback."""
    code = ("import sys; from hpcmoe import launch\n"
            "def work():\n    for i in range(100000): print('line', i)\n"
            "raise SystemExit(launch.run_main(work))")
    command = f"{sys.executable} -c \"$CODE\" | head -n 1"
    done = subprocess.run(["bash", "-c", command], env=environment({"CODE": code}), capture_output=True, text=True, timeout=60)
    assert done.stdout == "line 0\n" and done.stderr == ""


@pytest.mark.parametrize("text", ["rank=x", "rank", "rank=1,step=two", "rank=1,how=explode", "ranks=1"])
def test_failure_point_refuses_nonsense(text, monkeypatch):
    from hpcmoe import failing
    from hpcmoe.errors import UserError
    monkeypatch.setenv("HPCMOE_FAIL", text)
    with pytest.raises(UserError, match="HPCMOE_FAIL"):
        failing.failure_point(0)


def test_failure_point(monkeypatch):
    from hpcmoe import failing
    monkeypatch.setenv("HPCMOE_FAIL", "rank=1,step=2,how=memory")
    failing.failure_point(0)(2)
    point = failing.failure_point(1)
    point(1)
    with pytest.raises(MemoryError):
        point(2)
