"""`hpcmoe` on N ranks, some of which halt on the way: RANK:WHERE:HOW[,...] ARGUMENTS...

WHERE: a method of job.Session, or `round`: the start of round 1. HOW: stop (SIGSTOP), or sleep or spin with seconds: spin=2.5.
"""

import os
import signal
import sys
import time

from hpcmoe import cli, failing
from hpcmoe.environment import env_rank


def halt(how: str) -> None:
    how, _, seconds = how.partition("=")
    end = time.monotonic() + float(seconds or 0)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    while time.monotonic() < end:
        if how == "sleep":
            time.sleep(end - time.monotonic())


def halt_before(where: str, how: str) -> None:
    """From now on this rank halts where it is told to."""
    if where == "round":
        failing.failure_point = lambda rank: lambda step: halt(how) if step == 1 else None
        return
    from hpcmoe import job
    method = getattr(job.Session, where)

    def halting(self, *args):
        halt(how)
        return method(self, *args)

    setattr(job.Session, where, halting)


def main() -> int:
    from hpcmoe import launch
    launch.start_mpi()  # job.py imports MPI
    for item in sys.argv[1].split(","):
        rank, where, how = item.split(":")
        if int(rank) == env_rank(os.environ):
            halt_before(where, how)
    return cli._main(sys.argv[2:])


if __name__ == "__main__":
    from hpcmoe.launch import run_main
    raise SystemExit(run_main(main))
