"""Jobs that go wrong while they run or before: one message, a bad exit code, no rank left, nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpi import Done, environment, kill_group, run_ranks, start_ranks, vendor
from tiny import tiny_job

pytestmark = pytest.mark.mpi
GONE_S = 10.0
FINAL = ("outputs.jsonl", "outputs.h5", "report.json", "expert_load.h5")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return tiny_job(tmp_path_factory.mktemp("faults"))


def arguments(job, out, *more) -> list[str]:
    return ["-m", "hpcmoe", "run", str(job), "--output", str(out), *more]


def survivors(out) -> list[int]:
    """Ranks that still run: processes whose command line names this output folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(out).encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def all_gone(out, seconds=GONE_S) -> bool:
    end = time.monotonic() + seconds
    while survivors(out) and time.monotonic() < end:
        time.sleep(0.1)
    return not survivors(out)


def messages(done: Done) -> list[str]:
    """The program's messages of failure; progress and facts begin with other words."""
    facts = ("hpcmoe: layout dp", "hpcmoe: weights loaded", "hpcmoe: outputs")
    return [line for line in (done.out + done.err).splitlines() if line.startswith("hpcmoe: ") and not line.startswith(facts)]


def failed(done: Done, out, *words: str, code=None, tracebacks=0) -> None:
    """Checks all that each case asks for."""
    text = done.out + done.err
    assert done.rc is not None, f"hangs\n{text}"
    assert done.rc != 0 and (code is None or done.rc == code), text
    assert len(messages(done)) == bool(words), text
    for word in words:
        assert word in messages(done)[0], text
    assert text.count("Traceback") == tracebacks, text
    assert all_gone(out)
    assert [name for name in FINAL if os.path.exists(os.path.join(out, name))] == []


@pytest.mark.parametrize("how, words, tracebacks", [
    ("raise", ["internal error: RuntimeError: HPCMOE_FAIL asked for this (rank 3 on "], 1),
    ("memory", ["out of memory: HPCMOE_FAIL (rank 3 on "], 0),
    ("kill", [], 0),  # the launcher's own message names the rank's signal
])
def test_a_rank_fails_in_mid_step(job, tmp_path, how, words, tracebacks):
    out = tmp_path / "out"
    done = run_ranks(4, arguments(job, out), env={"HPCMOE_FAIL": f"rank=3,step=2,how={how}"}, timeout=60)
    failed(done, out, *words, tracebacks=tracebacks)
    assert how != "kill" or "9" in done.out + done.err


@pytest.mark.parametrize("how", ["Ctrl-C", "rank killed"])
def test_ended_from_outside(tmp_path, how):
    """While the job runs: SIGINT to the launcher, SIGKILL to a rank."""
    job, out = tiny_job(tmp_path, requests=32, max_tokens=110), tmp_path / "out"
    process = start_ranks(4, arguments(job, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines: list[str] = []
        signal.alarm(90)  # a job that never starts must not hold up the tests
        while not lines or "weights loaded" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        time.sleep(0.5)
        assert process.poll() is None, "the job was too short for this test"
        begin = time.monotonic()
        ranks = [pid for pid in survivors(out) if b"python" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]]
        os.kill(*((process.pid, signal.SIGINT) if how == "Ctrl-C" else (ranks[-1], signal.SIGKILL)))
        text, _ = process.communicate(timeout=30)
        assert all_gone(out, GONE_S - (time.monotonic() - begin))
        done = Done(process.returncode, "", text, 0.0)
        # Open MPI's mpirun passes nothing on any more once it was interrupted.
        failed(done, out, *(["interrupted"] if how == "Ctrl-C" and vendor() != "Open MPI" else []))
    finally:
        kill_group(process)


@pytest.mark.parametrize("ranks, sets, words", [
    (3, ["layout.pp=2", "layout.ep=2"], ["pp=2 ep=2 does not fit 3 ranks", "nearest", "ep=3"]),
    (4, ["layout.ep=17"], ["ep=17 does not fit 4 ranks", "16 experts"]),
    (4, ["layout.pp=5"], ["pp=5 does not fit 4 ranks", "4 layers"]),
])
def test_layout_that_does_not_fit(job, tmp_path, ranks, sets, words):
    out = tmp_path / "out"
    done = run_ranks(ranks, arguments(job, out, *(x for s in sets for x in ("--set", s))), timeout=60)
    failed(done, out, *words, code=2)


@pytest.mark.parametrize("option, words", [
    (["no-such-job.toml"], ["no-such-job.toml"]),
    (["--weights", "no-such-file.h5"], ["no-such-file.h5"]),
    (["--set", "run.lanez=2"], ["lanez", "lanes"]),
    (["--set", "run.lanes=two"], ["run.lanes"]),
])
def test_what_the_user_can_mend_is_said_once(job, tmp_path, option, words):
    out = tmp_path / "out"
    start = arguments(job, out) if option[0].startswith("--") else ["-m", "hpcmoe", "run", "--output", str(out)]
    failed(run_ranks(3, [*start, *option], timeout=60), out, *words, code=2)


def test_usage_is_said_once(job, tmp_path):
    done = run_ranks(3, arguments(job, tmp_path / "out", "--no-such-option"), timeout=60)
    assert done.rc == 2
    assert (done.out + done.err).count("--no-such-option") == 1


def test_output_folder_below_a_file(job, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    failed(run_ranks(2, arguments(job, out), timeout=60), out, str(tmp_path / "file"), code=2)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_output_folder_not_writable(job, tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    failed(run_ranks(2, arguments(job, out), timeout=60), out, str(out), code=2)


def mounted(folder: Path, options: str) -> None:
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")


def test_output_folder_on_a_read_only_file_system(job, tmp_path):
    out = tmp_path / "out"
    mounted(out, "ro,size=1m")
    try:
        failed(run_ranks(2, arguments(job, out), timeout=60), out, str(out), code=2)
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.parametrize("size", ["4k", "12k", "24k"])
def test_disk_full_while_writing(job, tmp_path, size):
    """At 4 KiB the first file does not fit, with more room a later one; what is there is whole."""
    out = tmp_path / "out"
    mounted(out, f"size={size}")
    try:
        done = run_ranks(4, arguments(job, out), timeout=60)
        assert done.rc not in (0, None), done.out + done.err
        assert len(messages(done)) == 1, done.err
        assert "No space left on device" in messages(done)[0] and str(out) in messages(done)[0], done.err
        assert "Traceback" not in done.err
        assert all_gone(out)
        assert not (out / "report.json").exists(), "the report is the mark of a complete job"
        rows = out / "outputs.jsonl"
        assert not rows.exists() or len(rows.read_text().splitlines()) == 8
        assert not list(out.glob("*.part")), "temporary files are removed"
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_file_size_limit_while_writing(job, tmp_path):
    """The same without mounts. The limit is set once MPI has its shared memory, in larger files."""
    out = tmp_path / "out"
    program = ["-c", "import resource, sys; from mpi4py import MPI; from hpcmoe.cli import main\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); sys.exit(main())", *arguments(job, out)[2:]]
    failed(run_ranks(1, program, timeout=60), out, "File too large")


def test_lonely_ranks_do_not_run_the_job(job, tmp_path):
    """World size 1 while the launcher's environment says more."""
    out = tmp_path / "out"
    for rank in (0, 1):
        env = environment({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank)})
        done = subprocess.run([sys.executable, *arguments(job, out)], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert done.stderr.count("a world of size 1") == (rank == 0)
        assert not out.exists()
