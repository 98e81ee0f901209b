"""`hpcmoe` on N ranks, one of which sleeps at the start of each of its rounds: RANK SECONDS ARGUMENTS..."""

import sys
import time

from hpcmoe import cli, failing


def sleeping(rank: int):
    def sleep(step: int) -> None:
        if rank == slow:
            time.sleep(seconds)
    return sleep


if __name__ == "__main__":
    slow, seconds = int(sys.argv[1]), float(sys.argv[2])
    failing.failure_point = sleeping
    raise SystemExit(cli.main(sys.argv[3:]))
