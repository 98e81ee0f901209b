"""Runs a job (arguments as for hpcmoe) on a network and experts of given speed: messages take HPCMOE_TEST_BYTE_S seconds per byte of
their larger side, at least, and an expert sleeps HPCMOE_TEST_PRODUCT_S seconds, and HPCMOE_TEST_ROW_S for each of its rows."""

import os
import sys
import time

from hpcmoe import cli
from hpcmoe.compute.host import HostCompute
from hpcmoe.parallel.handle import Handle

BYTE_S, PRODUCT_S, ROW_S = (float(os.environ[f"HPCMOE_TEST_{name}_S"]) for name in ("BYTE", "PRODUCT", "ROW"))
start, test, expert = Handle.start, Handle.test, HostCompute.expert


def timed_start(self):
    posted = start(self)
    if posted and not hasattr(self, "posted_s"):
        self.posted_s = time.monotonic()
    return posted


def late_test(self):
    if not self.over and self.start() and self.requests and time.monotonic() < self.posted_s + BYTE_S * max(a.nbytes for a in self.keep):
        return False
    return test(self)


def slow_expert(self, m, layer, x_id, n_recv_re):
    if len(x_id):
        time.sleep(PRODUCT_S + ROW_S * len(x_id))
    return expert(self, m, layer, x_id, n_recv_re)


Handle.start, Handle.test, HostCompute.expert = timed_start, late_test, slow_expert
sys.exit(cli.main(sys.argv[1:]))
