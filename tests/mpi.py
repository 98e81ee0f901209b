"""Start N ranks under the MPI of the running interpreter, with a time limit; nothing outlives the call.

    done = run_ranks(4, ["-m", "hpcmoe", "doctor"])
    done = run_ranks(2, '''
        from mpi4py import MPI
        print(MPI.COMM_WORLD.size)
    ''')
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Done:
    """rc: exit status of mpiexec, None when the time limit ended it; out, err: texts; seconds: wall time."""

    rc: int | None
    out: str
    err: str
    seconds: float

    def check(self) -> "Done":
        """This, after a check that all went well; the failed ranks' output is the error text."""
        assert self.rc == 0, f"exit status {self.rc} after {self.seconds:.1f} s\n{self.out[-4000:]}\n{self.err[-4000:]}"
        return self


@lru_cache
def vendor() -> str:
    """ "MPICH", "Open MPI", ... of the running interpreter; MPI is not initialised."""
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.get_vendor()[0])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def started():
    """The module mpi4py.MPI, with MPI started in this process: a command that ran in it may have told mpi4py not to."""
    from mpi4py import MPI
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    return MPI


def mpiexec(n: int) -> list[str]:
    """The command that starts n ranks, without the program."""
    program = Path(sys.prefix, "bin", "mpiexec")
    command = [str(program) if program.exists() else "mpiexec", "-n", str(n)]
    if vendor() == "Open MPI":
        command[1:1] = ["--oversubscribe", "--bind-to", "none"]
    return command


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of the ranks: without a launcher's leftovers, one BLAS thread each."""
    launchers = ("SLURM_", "PMI_", "PMIX_", "OMPI_COMM_WORLD", "HYD", "PRTE_LAUNCHED", "MPI_LOCAL")
    env = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    env.pop("PYTHONUNBUFFERED", None)  # would write a line in pieces, which lines of other ranks come between
    env.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", OMPI_MCA_mpi_yield_when_idle="1")
    if os.getuid() == 0:
        for name in ("OMPI", "PRTE"):
            env.update({f"{name}_ALLOW_RUN_AS_ROOT": "1", f"{name}_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})
    env.update(extra or {})
    return env


def start_ranks(n: int, program, env: dict[str, str] | None = None, cwd=None, **popen) -> subprocess.Popen:
    """Popen of n ranks in a process group of their own. program: arguments for Python, or a script's text."""
    if isinstance(program, str):
        program = ["-c", textwrap.dedent(program)]
    other = (env or {}).get("HPCMOE_TEST_MPIEXEC")  # the launcher of an MPI that is not the interpreter's (cuda/bed.py)
    launcher = [*other.split(), "-n", str(n)] if other else mpiexec(n)
    return subprocess.Popen(launcher + [sys.executable, *map(str, program)], env=environment(env), cwd=cwd or ROOT,
                            start_new_session=True, stdin=subprocess.DEVNULL, **popen)


def run_ranks(n: int, program, timeout: float = 120, env: dict[str, str] | None = None, cwd=None) -> Done:
    """Run n ranks to their end. program: arguments for Python (a list) or a script's text."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start_ranks(n, program, env, cwd, stdout=out, stderr=err)
        try:
            rc: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            rc = None
        finally:
            kill_group(process)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return Done(rc, *texts, time.monotonic() - begin)


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL to mpiexec and all below it."""
    below = descendants(process.pid)
    for pid in below + [process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def descendants(pid: int) -> list[int]:
    """The processes below `pid`: launchers give their ranks process groups of their own."""
    parents: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        parents.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = [], [pid]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return found


def alive(pids: list[int]) -> list[int]:
    """Those of `pids` that still run (a zombie does not)."""
    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False
    return [pid for pid in pids if runs(pid)]
