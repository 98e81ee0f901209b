"""How a rank ends: by itself, together with all others, or for all that it can reach. Messages are printed once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback

from hpcmoe.doing import waits
from hpcmoe.environment import MPIRUN, SRUN, env_rank, launcher
from hpcmoe.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, UserError

EXIT_TERMINATED = 143  # 128 + SIGTERM, as shells count
TOGETHER_S = 3.0       # how long a failing rank waits for the others to fail as well
GRACE_S = 1.5          # how long a signalled main thread may take to end by itself
TEXT_BYTES = 2048      # of a message, when ranks compare theirs
FINALIZE_S = 60        # deadline of MPI_Finalize
TOLD_S = 3.0           # how long a rank waits to be ended by the one that the watch lets speak

# ours: whether start_mpi has started MPI; line: the communicator on which failures are told, and the watch asks; watch: that of this process; claim, first:
# whether this rank prints for its node; ending: the exit code, once this rank fails: from then on a signal ends it without a word;
# signalled_s: when the signal came that ends this rank
STATE: dict = {"ours": False, "line": None, "watch": None, "claim": None, "first": False, "lock": threading.Lock(),
               "ending": None, "signalled_s": None}


class Terminated(BaseException):
    """SIGTERM, as an exception of the main thread."""


# ---------------------------------------------------------------- messages
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
    if isinstance(error, OSError):
        return EXIT_FAILED, f"{before}hpcmoe: {error}"
    return EXIT_FAILED, f"{lines}hpcmoe: internal error: {type(error).__name__}: {error}"


def say(text: str) -> None:
    """On standard error, after what has been printed."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def started_mpi():
    """The module mpi4py.MPI between MPI_Init and MPI_Finalize, else None."""
    MPI = sys.modules.get("mpi4py.MPI")
    return MPI if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized() else None


# ---------------------------------------------------------------- ends
def finalize() -> None:
    """MPI_Finalize, once all ranks are here: the watch sees to that, a signal to what comes then. Not of an MPI that a
    caller of hpcmoe in the same process has started."""
    MPI, line = started_mpi(), STATE["line"]
    if MPI is None or not STATE["ours"]:
        return
    signal.alarm(0 if STATE["ending"] is None else 5)  # ends this process should it wait for messages that never come
    if line is not None:
        with waits("the end of all ranks"):
            _within(line.Ibarrier(), float("inf"))
        STATE["watch"].close()
    signal.alarm(FINALIZE_S if STATE["ending"] is None else 5)
    MPI.Finalize()
    signal.alarm(0)


def all_failed(MPI, code: int, text: str) -> bool:
    """True when every rank came here in time: then rank 0 has printed the messages, each once."""
    line = STATE["line"]
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
            say("\n".join([text] + others[:2]))
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


def end_all(MPI, code: int, text: str) -> None:
    """Print, unless a rank of this node already has, and end every rank. Does not return."""
    if MPI.COMM_WORLD.rank:  # where several fail, let the first rank speak; after a signal it also ends all
        time.sleep(GRACE_S + 1 if code in (EXIT_INTERRUPTED, EXIT_TERMINATED) else 0.5)
    if text:
        say_once(text)
    time.sleep(0.5)  # a rank that fails as well shall find the claim taken, and the text be on its way
    # Abort may hang, with Python's lock held, or return: SIGALRM's default action needs no Python.
    signal.alarm(3)
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)


def stalled(text: str) -> None:
    """The watch's end of this rank, from its thread; "": another rank speaks. Does not return."""
    if STATE["ending"] is not None:  # it is failing already, which has deadlines of its own
        return
    STATE["ending"] = EXIT_FAILED
    if not text:
        time.sleep(TOLD_S)
    end_all(started_mpi(), EXIT_FAILED, text and f"hpcmoe: {text}")


def say_once(text: str) -> bool:
    """Print for the first rank of a node that calls this; True for that rank, however often it calls.

    An abstract socket, which only one can bind, decides. The ranks of a node have a common parent,
    the launcher's daemon.
    """
    with STATE["lock"]:
        if STATE["claim"] is None:
            STATE["claim"] = socket.socket(socket.AF_UNIX)
            try:
                STATE["claim"].bind(f"\0hpcmoe-end-{os.getppid()}")
            except OSError:
                return False
            say(text)
            STATE["first"] = True
        return STATE["first"]


def watch_signals() -> None:
    """SIGINT and SIGTERM raise in the main thread; where that waits inside MPI, a second thread acts.

    Python's handlers run between Python instructions only. The wake-up pipe is written at once.
    """
    def raise_it(number, frame):
        if STATE["signalled_s"] is None and STATE["ending"] is None:
            STATE["signalled_s"] = time.monotonic()
        elif STATE["signalled_s"] is None or time.monotonic() > STATE["signalled_s"] + GRACE_S:
            os._exit(STATE["ending"] or EXIT_FAILED)
        else:  # MPICH's mpiexec sends SIGINT to a rank and again to its group
            return
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch():
        number = 0
        while number not in (signal.SIGINT, signal.SIGTERM):
            number = os.read(read, 1)[0]
        if STATE["ending"] is not None and STATE["signalled_s"] is None:
            os._exit(STATE["ending"])
        code, text = describe(KeyboardInterrupt() if number == signal.SIGINT else Terminated())
        if env_rank(os.environ) == 0:
            say_once(text)  # at once: the launcher may kill all within a second
        time.sleep(GRACE_S)
        MPI = started_mpi()
        if MPI is not None and MPI.COMM_WORLD.size > 1:
            end_all(MPI, code, text)
        os._exit(code)

    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    # mpirun and srun end the other ranks with SIGTERM when one has failed, and say why themselves.
    quiet = launcher(os.environ) in (MPIRUN, SRUN)
    for number in (signal.SIGINT,) if quiet else (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell sets it for its background jobs
            signal.signal(number, raise_it)
    threading.Thread(target=watch, daemon=True, name="signals").start()
