"""The watch on progress: what it says, whom it lets live, and how it ends a job: on one host, and on two with a link that breaks."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from local import choices
from mpi import ROOT, environment, kill_group, run_ranks, started, vendor
from test_faults import all_gone, arguments, failed, survivors
from tiny import tiny_job

HALTING = str(ROOT / "tests" / "programs" / "halting.py")
CLUSTER = ROOT.parent / "shared" / "testbed" / "netns" / "cluster.sh"
END_S = 15.0  # after run.stall_s all ranks are gone: docs/running.md


# ---------------------------------------------------------------- what it says
def states(*rows):
    """{rank: Status} of rows (phase, round, step, waits, seconds)."""
    from hpcmoe.doing import Status
    return {r: Status((phase, number, step), f"is at {number}.{step}", waits, quiet_s)
            for r, (phase, number, step, waits, quiet_s) in enumerate(rows)}


@pytest.fixture
def hosts(monkeypatch):
    from hpcmoe.doing import HERE
    monkeypatch.setattr(HERE, "hosts", ["n0", "n0", "n1", "n1"])


def test_who_does_not_answer_is_named_by_host_and_the_earliest_of_the_others(hosts):
    from hpcmoe.watch import verdict
    text = verdict(0, [2, 3], states((3, 7, 4, True, 60), (3, 7, 1, True, 61)), 4, 60)
    assert text == ("no progress for 60 s (run.stall_s): no answer from ranks 2-3 on n1 (dead, cut off, stopped or stuck); rank 0 on n0 is at 7.4 "
                    "(since 60 s); the earliest other one of 2 that answer: rank 1 on n0 is at 7.1 (since 61 s)")


@pytest.mark.parametrize("rows, words", [
    ([(3, 7, 4, True, 60), (3, 7, 1, True, 60), (3, 6, 9, True, 61), (3, 7, 0, True, 70)], ["all ranks answer", "wait for one another", "rank 2 on n1"]),
    ([(3, 7, 4, True, 60), (3, 7, 1, True, 60), (3, 6, 9, True, 61), (3, 7, 0, True, 59)], []),  # one went on a moment ago
    ([(3, 7, 4, True, 60), (3, 7, 1, True, 60), (3, 6, 9, False, 30), (3, 7, 0, True, 60)], []),  # one works
    ([(3, 7, 4, True, 60), (3, 7, 1, True, 60), (3, 6, 9, False, 60), (3, 7, 0, True, 60)], ["rank 2 on n1 is at 6.9 (since 60 s) stands still"]),
    ([(2, 0, 0, True, 60), (2, 0, 0, True, 60), (2, 0, 0, False, 599), (2, 0, 0, True, 60)], []),  # a disk may take long
    ([(4, 0, 0, True, 60), (4, 0, 0, True, 60), (4, 0, 0, False, 600), (4, 0, 0, True, 60)], ["rank 2 on n1 is at 0.0 (since 600 s) stands still"]),
    ([(3, 7, 4, True, 60), (3, 7, 1, True, 60), (3, 6, 9, True, 61)], []),  # one has not been heard yet
])
def test_a_job_ends_where_nobody_goes_on_any_more(hosts, rows, words):
    from hpcmoe.watch import verdict
    text = verdict(0, [], states(*rows), 4, 60)
    assert bool(text) == bool(words)
    for word in words:
        assert word in text


@given(st.sets(st.integers(0, 40), min_size=1))
def test_ranks_in_words(ranks):
    from hpcmoe.doing import HERE
    from hpcmoe.watch import ranks_in_words
    before, HERE.hosts = HERE.hosts, [f"n{r // 8}" for r in range(41)]
    try:
        text = ranks_in_words(list(ranks))
    finally:
        HERE.hosts = before
    found = []
    for group in text.split("; "):
        numbers, _, host = group.removeprefix("ranks ").removeprefix("rank ").partition(" on ")
        for span in numbers.split(", "):
            first, _, last = span.partition("-")
            here = range(int(first), int(last or first) + 1)
            assert {f"n{r // 8}" for r in here} == {host}
            found += here
    assert found == sorted(ranks)


def test_where_nobody_can_be_asked_the_deadline_ends_any_wait(monkeypatch):
    from hpcmoe import watch
    from hpcmoe.doing import HERE
    monkeypatch.setattr(HERE, "stall_s", 0.3)
    monkeypatch.setattr(HERE, "wait", ("bcast", None))
    monkeypatch.setattr(HERE, "phase", 0)
    said, ended = [], threading.Event()
    watch.Watch(SimpleNamespace(rank=1, size=2), False, lambda text: (said.append(text), ended.set()))
    assert ended.wait(10)
    assert said[0].startswith("no progress for 0.3 s (run.stall_s): rank 1 at the start waits for bcast")
    assert "no MPI_THREAD_MULTIPLE" in said[0]


def test_a_wait_for_the_own_device_is_work(monkeypatch):
    """A message that stands back until a buffer is ready is not what other ranks are late with."""
    from hpcmoe.doing import HERE, status
    from hpcmoe.parallel.handle import Chain, Handle, Together
    busy = SimpleNamespace(done=False)
    comm = started().COMM_SELF.Dup()
    message = bytearray(1)
    for make in (lambda: Handle(lambda: [comm.Irecv(message, 0)], after=busy), lambda: Chain(iter([]), after=busy),
                 lambda: Together(Handle(lambda: [comm.Irecv(message, 0)], after=busy))):
        monkeypatch.setattr(HERE, "wait", ("DISPATCH.1.0", make()))
        assert not status(0).waits and "its device works on DISPATCH.1.0" in status(0).words
    posted = Handle(lambda: [comm.Irecv(message, 0)])
    for handle in (posted, Chain(iter([posted])), Together(posted)):
        monkeypatch.setattr(HERE, "wait", ("DISPATCH.1.0", handle))
        assert status(0).waits and "waits for DISPATCH.1.0" in status(0).words
    comm.Send(bytearray(1), 0)
    assert posted.test()
    HERE.wait = None


# ---------------------------------------------------------------- on one host
@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return tiny_job(tmp_path_factory.mktemp("watch"))


def halting(job, out, what: str, *more) -> list[str]:
    return [HALTING, what, *arguments(job, out, *more)[2:]]


@pytest.mark.mpi
@pytest.mark.parametrize("what, words", [
    ("3:_open_requests:stop", ["no answer from rank 3 on ", "rank 0 on ", "in set-up waits for gather in __init__ < _open_requests"]),
    ("0:round:stop,2:round:stop", ["no answer from ranks 0, 2 on ", "rank 1 on ", "in round 1 waits for COUNTS.0.0"]),
    ("1:_gather:stop,2:_gather:stop", ["no answer from ranks 1-2 on ", "at the end waits for gather in _gather"]),
    ("2:round:sleep=60", ["rank 2 on ", "in round 1 works on ", "stands still", "waits for COUNTS.0.0"]),
])
def test_ranks_that_stop_are_named_and_all_end(job, tmp_path, what, words):
    out = tmp_path / "out"
    done = run_ranks(4, halting(job, out, what, "--set", "run.stall_s=5"), timeout=90)
    failed(done, out, "no progress for 5 s (run.stall_s)", *words)


def rows(out) -> list[dict]:
    return choices([json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()])


@pytest.mark.mpi
def test_ranks_that_work_are_waited_for(job, tmp_path):
    """Rank 1 is busy, and before that waits for its disk, for longer than the deadline."""
    run_ranks(1, arguments(job, tmp_path / "one")).check()
    run_ranks(3, halting(job, tmp_path / "out", "1:_read_weights:sleep=8,1:round:spin=8", "--set", "run.stall_s=6"), timeout=90).check()
    assert rows(tmp_path / "out") == rows(tmp_path / "one")


# ---------------------------------------------------------------- on two hosts
def bed(*arguments: str) -> str:
    done = subprocess.run([CLUSTER, *arguments], env=BED, capture_output=True, text=True, timeout=90)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]}: {done.stdout}{done.stderr}")
    return done.stdout


BED = environment({"CLUSTER_NAME": f"w{os.getpid() % 10**6}", "PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def cluster():
    """Two hosts, each with two ranks of a job."""
    if not CLUSTER.exists():
        pytest.skip(f"no test bed of several hosts: {CLUSTER}")
    if os.getuid():
        pytest.skip("the test bed of several hosts wants root")
    try:
        bed("up", "2", "--rate", "200mbit", "--delay", "1ms")
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"the test bed of several hosts does not start: {error}")
    yield
    bed("down")


@pytest.fixture(scope="module")
def long_job(tmp_path_factory):
    """Some 360 steps of four sequences: seconds."""
    return tiny_job(tmp_path_factory.mktemp("long"), requests=24, max_tokens=60)


@pytest.fixture(scope="module")
def endless_job(tmp_path_factory):
    return tiny_job(tmp_path_factory.mktemp("endless"), requests=4000, max_tokens=60)


def start(job, out, stall_s: float) -> subprocess.Popen:
    """cluster.sh, once its job's ranks are about to run."""
    mpiexec = Path(sys.prefix, "bin", "mpiexec")
    process = subprocess.Popen([CLUSTER, "run", "2", "--timeout", "100", "--mpiexec", mpiexec, sys.executable, *arguments(job, out),
                                "--set", f"run.stall_s={stall_s}", "--set", "run.transport=ialltoallv", "--set", "run.max_sequences=4"], env=BED, start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "weights loaded" in line:
            time.sleep(0.5)
            return process
    raise AssertionError("the job did not start")


def ranks(out) -> list[int]:
    """The ranks of a job that still run, on whichever host."""
    def is_rank(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(sys.executable.encode() + b"\0-m\0")
        except OSError:  # it ended meanwhile
            return False
    return [pid for pid in survivors(out) if is_rank(pid)]


@pytest.mark.mpi
@pytest.mark.parametrize("fault", ["cut", "silent"])
def test_a_host_that_falls_silent_is_named_and_all_ranks_end_on_both_sides(cluster, endless_job, tmp_path, fault):
    out, stall_s = tmp_path / "out", 5
    process = start(endless_job, out, stall_s)
    try:
        assert len(ranks(out)) == 4
        begin = time.monotonic()
        bed("cut", "n1") if fault == "cut" else bed("shape", "n1", "--loss", "100%")
        while ranks(out) and time.monotonic() < begin + 60:
            time.sleep(0.1)
        assert time.monotonic() - begin < stall_s + END_S
        if vendor() == "Open MPI":  # its mpirun waits for the daemon of the lost host: docs/running.md
            process.terminate()
        text, _ = process.communicate(timeout=40)
        assert process.returncode != 0, text
        assert "no answer from ranks 2-3 on n1 (dead, cut off, stopped or stuck); rank 0 on n0 in round " in text
        assert text.count("no answer from ranks 2-3") == 1 and text.count("no answer from ranks 0-1") <= 1, text  # each side once
        assert not survivors(out) and list(out.glob("*")) == []
    finally:
        kill_group(process)
        bed("heal", "n1") if fault == "cut" else bed("shape", "n1", "--loss", "none")


@pytest.mark.mpi
def test_a_link_that_heals_within_the_deadline_changes_nothing(cluster, long_job, tmp_path):
    run_ranks(1, arguments(long_job, tmp_path / "one")).check()
    process = start(long_job, tmp_path / "out", 30)
    try:
        bed("cut", "n1")
        time.sleep(2)
        assert len(ranks(tmp_path / "out")) == 4
        bed("heal", "n1")
        text, _ = process.communicate(timeout=80)
        assert process.returncode == 0, text
        assert rows(tmp_path / "out") == rows(tmp_path / "one")
    finally:
        kill_group(process)
