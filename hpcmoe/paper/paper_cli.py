"""The command line of `hpcmoe paper`."""

from __future__ import annotations

import argparse
import os

EXAMPLES = """examples:
  hpcmoe paper --out docs/paper.md
  hpcmoe paper --out h200/paper.md --cluster inputs/clusters/dgx_h200_ndr.toml
  hpcmoe paper --out narrow/paper.md --hidden 4096 --expert-width 14336 --attention-width 4096 --context 1024
"""
DEFAULTS = "inputs/models/paper.toml"


def add_parser(subparsers) -> None:
    """Adds `paper`."""
    p = subparsers.add_parser("paper", help="the paper's figures, reproduced and taken apart by simulation", epilog=EXAMPLES,
                              formatter_class=argparse.RawDescriptionHelpFormatter,
                              description="Computes docs/paper.md and its pictures: roofline, the paper's table, what it left on the table, scaling, and where one "
                              "expert per GPU wins. Takes a minute or two. The same arguments give the same page.")
    p.add_argument("--out", required=True, metavar="FILE", help="the page (Markdown); pictures go to pictures/ beside it")
    p.add_argument("--cluster", metavar="FILE", default=None, help="a cluster file of at least 64 GPUs (default inputs/clusters/dgx_h100_ndr.toml)")
    for name, words in (("hidden", "model width"), ("expert-width", "hidden width of an expert"), ("attention-width", "heads x width of a head"),
                        ("top-k", "experts per token")):
        p.add_argument(f"--{name}", type=int, metavar="N", help=f"{words} (default: as in {DEFAULTS})")
    p.add_argument("--context", type=int, metavar="N", help="tokens in the cache of a sequence (default 24: 16 of a prompt and half of 16 outputs)")
    p.add_argument("--memory-gb-per-s", type=float, metavar="X", help="memory rate by the GPU's data sheet (default: known for shipped calibrations)")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that compute (default: as many as cores)")
    p.set_defaults(handler=_run)


def _run(args) -> int:
    from hpcmoe.paper import document  # the simulator among others: other commands do without
    return document.run(args)
