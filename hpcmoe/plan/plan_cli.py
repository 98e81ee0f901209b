"""The command line of `hpcmoe plan`."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  hpcmoe plan inputs/demo/model.h5 --cluster inputs/clusters/demo_2_cores.toml --gpus 2 --prompt-tokens 16 --output-tokens 16
  hpcmoe plan inputs/models/paper.toml --cluster inputs/clusters/dgx_h100_ndr.toml --gpus 64 --tpot-ms 4
  hpcmoe plan config.json --cluster mine.toml --gpus 32 --load power-law:1.2 --out plan.json --plot plan.svg --script plan.sbatch
  hpcmoe plan model.h5 --cluster mine.toml --gpus 16 --set layout.tp=1 --set run.batch_tokens=4096    these are not searched
"""


def add_parser(subparsers) -> None:
    """Adds `plan`."""
    p = subparsers.add_parser("plan", help="which layout to ask a cluster for", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
                              description="Searches layouts, leaders, batches, micro-batches in flight, lanes, copies of experts and transports with the "
                              "simulator of hpcmoe simulate; prints which give most tokens/s per GPU at which TPOT, why the second best "
                              "lost, and a job and a script for Slurm.")
    p.add_argument("model", metavar="MODEL", help="a weights file (.h5), a Hugging Face config.json, or a model's sizes (.toml, see inputs/models)")
    p.add_argument("--cluster", required=True, metavar="FILE", help="a cluster file (inputs/clusters/*.toml)")
    p.add_argument("--gpus", required=True, type=int, metavar="N", help="ranks of the job, along the nodes")
    p.add_argument("--tpot-ms", type=float, metavar="X", help="the best must give each sequence a token every X ms, in the mean")
    p.add_argument("--calibration", metavar="FILE", help="kernels of a rank; left out: what the cluster file names")
    for name, default, words in (("prompt-tokens", "128", "tokens of each prompt"), ("output-tokens", "32", "tokens of each output"),
                                 ("sequences", "256 per GPU", "requests that there are: no more run at once")):
        p.add_argument(f"--{name}", type=int, metavar="N", help=f"{words} (default {default})")
    p.add_argument("--load", default="uniform", metavar="LOAD", help="how rows are spread over experts: uniform (default), "
                   "power-law:EXPONENT[:SEED], or a file expert_load.h5 or routing.h5 of a run")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="a key of the job (docs/running.md); what would be "
                   "searched (layout.*, run.micro_batches, lanes, batch_tokens, max_sequences, transport) is then fixed")
    p.add_argument("--out", metavar="FILE", help="all candidates and the answer as JSON")
    p.add_argument("--plot", metavar="FILE", help="draw tokens/s per GPU against TPOT to a PNG or SVG file (extra [plot])")
    p.add_argument("--script", metavar="FILE", help="write the script for sbatch here, and its job beside it (.toml); left out: both are printed")
    p.add_argument("--processes", type=int, metavar="N", help="default: as many as cores")
    p.set_defaults(handler=_run)


def _run(args) -> int:
    from hpcmoe.plan import run  # h5py among others: other commands do without
    return run.run(args)
