"""The command line of `hpcmoe simulate`."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  hpcmoe simulate inputs/demo/model.h5 --cluster inputs/clusters/demo_2_cores.toml --sequences 64
  hpcmoe simulate inputs/models/paper.toml --cluster inputs/clusters/dgx_h100_ndr.toml --set layout.pp=4 --set layout.ep=16 \\
      --sequences 1024 --prompt-tokens 16 --output-tokens 16 --output sim
  hpcmoe simulate config.json --cluster mine.toml --gpus 32 --load power-law:1.2 --trace trace.json
  hpcmoe report real sim                         a run and its simulation side by side
"""


def add_parser(subparsers) -> None:
    """Adds `simulate`."""
    p = subparsers.add_parser("simulate", help="what a run would take on a cluster that is not here", epilog=EXAMPLES,
                              formatter_class=argparse.RawDescriptionHelpFormatter,
                              description="Executes the schedule that a run would have with a clock, on a described cluster, and prints "
                              "the report that the run would print.")
    p.add_argument("model", metavar="MODEL", help="a weights file (.h5), a Hugging Face config.json, or a model's sizes (.toml, see inputs/models)")
    p.add_argument("--cluster", required=True, metavar="FILE", help="a cluster file (inputs/clusters/*.toml)")
    p.add_argument("--calibration", metavar="FILE", help="kernels of a rank; left out: what the cluster file names")
    p.add_argument("--gpus", type=int, metavar="N", help="ranks of the job, along the nodes; left out: all of the cluster")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="a key of a job (docs/running.md), e.g. layout.pp=4")
    p.add_argument("--requests", metavar="FILE", help="requests of these lengths, each answered in full; else a batch of equal ones:")
    for name, default in (("sequences", 1024), ("prompt-tokens", 128), ("output-tokens", 32)):
        p.add_argument(f"--{name}", type=int, metavar="N", help=f"as throughput.{name.replace('-', '_')} (default {default})")
    p.add_argument("--load", default="uniform", metavar="LOAD", help="how rows are spread over experts: uniform (default), "
                   "power-law:EXPONENT[:SEED], or a file expert_load.h5 or routing.h5 of a run")
    p.add_argument("--output", metavar="DIR", help="where report.json goes; left out: only the table")
    p.add_argument("--trace", metavar="FILE", help="write a Chrome/Perfetto trace of all ranks")
    p.set_defaults(handler=_run)


def _run(args) -> int:
    from hpcmoe.simulate import run  # h5py among others: other commands do without
    return run.run(args)
