"""`hpcmoe bench`: measurements on this machine."""

from __future__ import annotations

import argparse
import sys

OVERLAP_EXAMPLES = """examples:
  mpiexec -n 8 hpcmoe bench overlap
  mpiexec -n 8 hpcmoe bench overlap --rows 16,64,256 --micro-batches 1,2 --transports pairwise,hierarchical --out overlap.json
  mpiexec -n 8 hpcmoe bench overlap --rows 64 --asleep-us 250
  srun -n 64 hpcmoe bench overlap --d 4096 --f 14336 --layers 1

One stage over all ranks, on CPUs; all of them leaders, random choices of experts. Each line is of `rows` token rows per leader,
cut into micro-batches on lanes of their own, through the layers' exchanges and experts, by the engine and the schedule of a run:
overall time; the products alone; the exchanges alone (counts, dispatch, combine); overlap % as the OSU micro-benchmarks
compute it; speed-up: overall time with the first number of micro-batches over this one.
"""
EXAMPLES = """examples:
  hpcmoe bench gpu --out gpu.json
  hpcmoe bench gpu --out gpu.json --only correct,expert
  hpcmoe bench gpu --out gpu.json --mpiexec mpiexec --peer-python torch-venv/bin/python

Needs CuPy and a GPU; takes at most 8 minutes. Figures are times of CUDA events, medians of repetitions over
buffers larger than the L2 cache. exit code 0: done, whatever the goals; 1: a kernel is not correct, or a
section failed; 2: no GPU.
"""


def add_parser(subparsers) -> None:
    """Adds `bench` and its sub-commands."""
    parser = subparsers.add_parser("bench", help="measure this machine", description="Measures this machine.")
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="gpu|overlap")
    gpu = commands.add_parser("gpu", help="kernels, expert step, layers and whole models on one GPU", epilog=EXAMPLES,
                              description="Checks the kernels of this version on a GPU and measures them.",
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu.add_argument("--out", required=True, metavar="FILE", help="JSON file for all figures")
    gpu.add_argument("--only", default="", metavar="A,B", help="these sections only: correct, expert, wide, several, kernels, gemm, "
                     "peers, layer, model, stack, exchange, calibrate")
    gpu.add_argument("--budget", type=float, default=0.0, metavar="S", help="seconds for all sections (default 480)")
    gpu.add_argument("--dtype", choices=("fp16", "bf16"), default="fp16", help="16-bit type of what is timed")
    gpu.add_argument("--mpiexec", default="", metavar="COMMAND", help="launcher of a CUDA-aware MPI, with its options: runs 2, 4 and "
                     "16 ranks on the one GPU")
    gpu.add_argument("--peer-python", default=sys.executable, metavar="PYTHON", help="a Python with torch and transformers to compare "
                     "with (default: this one)")
    gpu.add_argument("--scale", choices=("full", "small"), default="full", help="small: tiny sizes, to try the program; no measurement")
    gpu.set_defaults(handler=run)
    _add_overlap(commands)


def _add_overlap(commands) -> None:
    p = commands.add_parser("overlap", help="how much of the exchange hides behind the experts, over MPI", epilog=OVERLAP_EXAMPLES,
                            description="Measures overlap of exchange and expert products on all ranks that the launcher started.",
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--transports", default="", metavar="A,B", help="of ialltoallv, pairwise, staged, hierarchical (default: all that work here)")
    p.add_argument("--rows", default="16,64,256", metavar="N,N", help="token rows of a leader, in all micro-batches together (default 16,64,256)")
    p.add_argument("--micro-batches", default="1,2,4", metavar="N,N", help="each on a lane of its own (default 1,2,4)")
    for name, default, words in (("d", 1024, "width of a row, fp32"), ("f", 1024, "hidden width of an expert"),
                                 ("experts", 0, "of a layer; 0: one per rank"), ("top-k", 2, "experts of a token"),
                                 ("layers", 2, "of the model"), ("repeats", 7, "of each measurement")):
        p.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{words} (default {default})")
    p.add_argument("--asleep-us", type=float, default=0.0, metavar="T", help="sleep T microseconds for each row of an expert instead of "
                   "computing: where ranks share cores, as if each had its own (default 0: products)")
    p.add_argument("--out", default="", metavar="FILE", help="JSON file for all figures")
    p.set_defaults(handler=_run_overlap)


def _run_overlap(args) -> int:
    from hpcmoe.bench import overlap
    return overlap.run(args)


def run(args) -> int:
    """Runs `bench gpu`; its exit code. Raises UserError for an unknown section, or where there is no GPU."""
    from hpcmoe.bench import gpu
    from hpcmoe.bench.bed import Options
    from hpcmoe.errors import UserError
    only = [name.strip() for name in args.only.split(",") if name.strip()]
    for name in only:
        if name not in gpu.PARTS:
            raise UserError(f"--only {args.only}: {name!r}: expected some of {', '.join(gpu.PARTS)}")
    if args.budget < 0:
        raise UserError(f"--budget {args.budget:g}: expected seconds > 0")
    options = Options(args.scale == "small", args.dtype, args.mpiexec, args.peer_python)
    return gpu.bench(args.out, only, args.budget or gpu.BUDGET_S, options)
