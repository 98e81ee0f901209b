"""The command line of `hpcmoe balance`."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  hpcmoe balance --load out/expert_load.h5
  hpcmoe balance --load out/expert_load.h5 --ep 8 --replicas 0,8,16
  hpcmoe balance --power-law 1.2 --tokens 4096
"""


def add_parser(subparsers) -> None:
    """Adds `balance`."""
    p = subparsers.add_parser("balance", help="what spare ranks with copies of hot experts would bring", epilog=EXAMPLES,
                              formatter_class=argparse.RawDescriptionHelpFormatter,
                              description="Plans copies of experts for several numbers of spare slots, and prints how evenly ranks would "
                              "be loaded: over the whole run, and step by step in its later half when planned from the earlier one.")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--load", metavar="FILE", help="expert_load.h5 of a run")
    what.add_argument("--power-law", type=float, metavar="X", help="made-up routing: each token draws its experts one after the other, "
                      "without replacement, with probabilities in proportion to rank^-X of those that are left")
    p.add_argument("--replicas", default="0,2,4,8,16", metavar="N,N,...", help="spare slots per layer (default 0,2,4,8,16)")
    p.add_argument("--ep", type=int, default=0, metavar="N", help="expert places over which the slots are dealt; 0: a rank for each slot (default)")
    for name, default, words in (("experts", 16, "experts of a layer"), ("top-k", 2, "experts of a token"), ("tokens", 1024, "tokens of a step"),
                                 ("steps", 64, "steps"), ("layers", 4, "layers, drawn independently"), ("seed", 0, "of the random numbers")):
        p.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"with --power-law: {words} (default {default})")
    p.set_defaults(handler=_run)


def _run(args) -> int:
    from hpcmoe.cluster import balance_run  # h5py among others: other commands do without
    return balance_run.run(args)
