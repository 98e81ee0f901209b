"""Runs a job (arguments as for hpcmoe) in which attention and experts take HPCMOE_TEST_SLEEP_S seconds each, asleep, besides what
they do: as if every rank had a core, or a GPU, of its own. Engine, schedule, MPI and rows are the real ones."""

import os
import sys
import time

from hpcmoe import cli
from hpcmoe.compute.host import HostCompute

SECONDS = float(os.environ["HPCMOE_TEST_SLEEP_S"])
attend, expert = HostCompute.attend, HostCompute.expert


def slow_attend(self, m, layer):
    if self.micros[m].batch.rows:
        time.sleep(SECONDS)
    return attend(self, m, layer)


def slow_expert(self, m, layer, x_id, n_recv_re):
    if len(x_id):
        time.sleep(SECONDS)
    return expert(self, m, layer, x_id, n_recv_re)


HostCompute.attend, HostCompute.expert = slow_attend, slow_expert
sys.exit(cli.main(sys.argv[1:]))
