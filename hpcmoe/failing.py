"""A rank that fails on purpose, as HPCMOE_FAIL asks for: to try what then happens to a job."""

from __future__ import annotations

import os
import signal
import time
from typing import Callable

from hpcmoe.errors import UserError

HOW = ("raise", "memory", "kill", "stop", "hang")


def failure_point(rank: int) -> Callable[[int], None]:
    """A function to call with the number of each step; HPCMOE_FAIL="rank=3,step=2,how=kill" makes it fail there.

    how: "raise" (the default), "memory", "kill" (SIGKILL), "stop" (SIGSTOP), "hang". Free of charge when the variable is unset.
    """
    text = os.environ.get("HPCMOE_FAIL", "")
    if not text:
        return lambda step: None
    try:
        wanted = dict(part.split("=", 1) for part in text.split(","))
        at_rank, at_step, how = int(wanted.get("rank", 0)), int(wanted.get("step", 0)), wanted.get("how", "raise")
        if how not in HOW or not set(wanted) <= {"rank", "step", "how"}:
            raise ValueError(how)
    except ValueError as error:
        raise UserError(f'environment: HPCMOE_FAIL = {text!r}: expected "rank=R,step=S,how={"|".join(HOW)}"') from error

    def fail(step: int) -> None:
        if rank != at_rank or step != at_step:
            return
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        if how == "hang":
            time.sleep(3600)
        raise MemoryError("HPCMOE_FAIL") if how == "memory" else RuntimeError("HPCMOE_FAIL asked for this")

    return fail
