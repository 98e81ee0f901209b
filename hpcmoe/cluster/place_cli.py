"""The command line of `hpcmoe place`."""

from __future__ import annotations

import argparse

from hpcmoe.model.dtypes import STORED

EXAMPLES = """examples:
  hpcmoe run my.toml --set run.routing_statistics=true --output out
  hpcmoe place --weights m.h5 --routing out/routing.h5 --machine inputs/clusters/dgx_h100_ndr.toml --pp 4 --ep 16 --output placement.json
  mpiexec -n 16 hpcmoe place --weights m.h5 --routing out/routing.h5 --machine discovered --output placement.json
  mpiexec -n 20 hpcmoe place --weights m.h5 --routing out/routing.h5 --machine discovered --replicas 4 --output placement.json
  mpiexec -n 16 hpcmoe run my.toml --set layout.placement=placement.json
"""


def add_parser(subparsers) -> None:
    """Adds `place`."""
    p = subparsers.add_parser("place", help="decide which rank holds which expert", epilog=EXAMPLES,
                              formatter_class=argparse.RawDescriptionHelpFormatter,
                              description="Decides which rank holds which expert of which layer, so that fewer rows travel between "
                              "nodes, and prints what to expect of it before it is used.")
    p.add_argument("--weights", required=True, metavar="FILE", help="the model's weights file")
    p.add_argument("--routing", required=True, metavar="FILE", help="routing.h5 of a run with run.routing_statistics = true")
    p.add_argument("--machine", required=True, metavar="FILE", help="a cluster file (inputs/clusters/*.toml), or `discovered`: "
                   "the machine of this job's ranks")
    p.add_argument("--output", metavar="FILE", help="where the placement goes, for layout.placement; left out: only the figures")
    for name, words in (("dp", "replicas"), ("pp", "stages"), ("ep", "expert places")):
        p.add_argument(f"--{name}", type=int, default=0, metavar="N", help=f"{words}; 0: chosen for the machine's ranks, as a run does")
    p.add_argument("--replicas", type=int, default=0, metavar="N", help="as layout.replicas: spare slots per layer, for copies of hot "
                   "experts; balance then comes before traffic")
    p.add_argument("--leaders", default="all", help="as layout.leaders: all, node or a number per stage")
    p.add_argument("--exchange", choices=("flat", "hierarchical"), default="hierarchical", help="which traffic to lower: every row "
                   "by itself, or once per node (default)")
    p.add_argument("--dtype", choices=tuple(STORED), default="fp32", help="of rows and weights in the run (default fp32)")
    p.set_defaults(handler=_run)


def _run(args) -> int:
    from hpcmoe.cluster import place_run  # h5py among others: other commands do without
    return place_run.run(args)
