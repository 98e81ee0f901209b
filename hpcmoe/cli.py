"""The command line: `hpcmoe COMMAND`, also as `python -m hpcmoe COMMAND`."""

from __future__ import annotations

import os
import time

STARTED_S = time.monotonic()

RUN_EXAMPLES = """examples:
  hpcmoe run inputs/demo.toml
  mpiexec -n 16 hpcmoe run inputs/demo.toml
  srun -n 64 hpcmoe run inputs/throughput_1024.toml --device gpu --dtype fp16 --gpu-memory-fraction 0.85
  mpiexec -n 8 hpcmoe run inputs/demo.toml --set layout.pp=2 --set layout.ep=4 --trace trace.json
"""
SCHEDULE_EXAMPLES = """examples:
  hpcmoe schedule show --stages 4 --layers 4 --micro-batches 8 --lanes 2
  hpcmoe schedule show --stages 2 --layers 4 --text
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code (see hpcmoe.errors)."""
    from hpcmoe import launch
    return launch.run_main(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    import importlib.metadata

    from hpcmoe import doctor
    from hpcmoe.bench import bench_cli
    from hpcmoe.calibrate import calibrate_cli
    from hpcmoe.cluster import balance_cli, place_cli
    from hpcmoe.data import weights_cli
    from hpcmoe.launch import Parser
    from hpcmoe.paper import paper_cli
    from hpcmoe.plan import plan_cli
    from hpcmoe.report import report_cli
    from hpcmoe.simulate import simulate_cli
    parser = Parser(prog="hpcmoe", description="Batch inference of Mixture-of-Experts language models as an MPI job, "
                    "one expert per rank.", epilog="hpcmoe COMMAND --help shows examples of each command.")
    parser.add_argument("--version", action="version", version=f"hpcmoe {importlib.metadata.version('hpcmoe')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True, parser_class=Parser)
    _add_run(commands)
    _add_schedule(commands)
    weights_cli.add_parser(commands)
    report_cli.add_parser(commands)
    doctor.add_parser(commands)
    bench_cli.add_parser(commands)
    place_cli.add_parser(commands)
    balance_cli.add_parser(commands)
    calibrate_cli.add_parser(commands)
    simulate_cli.add_parser(commands)
    plan_cli.add_parser(commands)
    paper_cli.add_parser(commands)
    args = parser.parse_args(argv)
    return args.handler(args)


# ---------------------------------------------------------------- run
def _add_run(commands) -> None:
    import argparse
    p = commands.add_parser("run", help="run a job: generate, score or throughput", epilog=RUN_EXAMPLES,
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            description="Runs a job on all ranks that the launcher started; writes outputs.jsonl and report.json.")
    p.add_argument("job", nargs="?", help="job file (TOML); docs/running.md lists its keys")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="lay one key over the file's, e.g. run.lanes=2")
    p.add_argument("--weights", metavar="FILE", help="short for --set weights.file=FILE")
    p.add_argument("--requests", metavar="FILE", help="short for --set requests.file=FILE")
    p.add_argument("--output", metavar="DIR", help="short for --set output.dir=DIR")
    p.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), help="short for --set weights.dtype=...")
    p.add_argument("--device", choices=("auto", "cpu", "gpu"), help="short for --set run.device=...")
    p.add_argument("--gpu-memory-fraction", metavar="F", help="short for --set run.gpu_memory_fraction=F")
    p.add_argument("--replicas", metavar="N", help="short for --set layout.replicas=N: spare slots per layer for copies of hot experts")
    p.add_argument("--rebalance-every", metavar="K", help="short for --set run.rebalance_every=K: look at the load every K steps")
    p.add_argument("--capacity-factor", metavar="F", help="short for --set run.capacity_factor=F: at most ceil(F x tokens x top_k / experts) "
                   "rows per expert of a leader's micro-batch; CHANGES RESULTS (run.over_capacity: reroute or drop)")
    p.add_argument("--cluster", metavar="FILE", help="short for --set run.cluster=FILE: the machine's cluster file: the report says what was predicted")
    p.add_argument("--trace", metavar="FILE", help="write a Chrome/Perfetto trace of all ranks")
    p.add_argument("--quiet", action="store_true", help="no progress, no table; errors only")
    p.set_defaults(handler=_run)


def _run(args) -> int:
    from hpcmoe import device, environment, failing, launch
    device.early_context(environment.local_rank(os.environ), os.environ, [*args.sets, f"device={args.device}"])
    MPI = launch.start_mpi()
    from hpcmoe import job
    from hpcmoe.doing import HERE
    from hpcmoe.jobfile import read_job
    from hpcmoe.parallel.watched import Watched
    from hpcmoe.parallel.world import on_root
    short = {"weights.file": args.weights, "requests.file": args.requests, "output.dir": args.output,
             "weights.dtype": args.dtype, "run.device": args.device, "run.gpu_memory_fraction": args.gpu_memory_fraction,
             "layout.replicas": args.replicas, "run.rebalance_every": args.rebalance_every,
             "run.capacity_factor": args.capacity_factor,
             "run.cluster": args.cluster, "output.trace": args.trace}
    sets = args.sets + [f"{key}={value}" for key, value in short.items() if value is not None]
    if args.quiet:
        sets.append("output.quiet=true")
    comm = Watched(MPI.COMM_WORLD)
    config = on_root(comm, read_job, args.job, sets)
    HERE.stall_s = config.run.stall_s
    return job.run(comm, config, failing.failure_point(comm.rank), STARTED_S)


# ---------------------------------------------------------------- schedule show
def _add_schedule(commands) -> None:
    import argparse
    schedule = commands.add_parser("schedule", help="show what each rank does, without MPI")
    show = schedule.add_subparsers(metavar="show", required=True, dest="schedule_command").add_parser(
        "show", help="print the grid or the text of a schedule", epilog=SCHEDULE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Builds a schedule, checks it, and prints when each stage does what if every op took one tick.")
    show.add_argument("--schedule", default="overlapped", choices=("overlapped", "plain", "queued"))
    for name, default, words in (("stages", 1, "pipeline stages (pp)"), ("layers", 4, "layers of the model"),
                                 ("micro-batches", 0, "in flight per replica (default: stages x lanes)"),
                                 ("lanes", 1, "micro-batches interleaved on a stage"), ("rounds", 2, "rounds to draw")):
        show.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{words} (default {default or 'see text'})")
    show.add_argument("--shards", action="store_true", help="with tensor shards (tp > 1): the sums that they make")
    show.add_argument("--text", action="store_true", help="the programs as text, which can be parsed again")
    show.add_argument("--plot", metavar="FILE", help="draw the grid to a PNG or SVG file (extra [plot])")
    show.set_defaults(handler=_show_schedule)


def _show_schedule(args) -> int:
    from hpcmoe.parallel import check, schedule
    micros = args.micro_batches or args.stages * args.lanes
    built = schedule.build(args.schedule, args.stages, args.layers, micros, args.lanes, args.shards)
    check.check(built)
    if args.text:
        print(built, end="")
        return 0
    cells = check.timeline(built, args.rounds)
    print(check.draw(built, cells))
    if args.plot:
        from hpcmoe.report.plots import plot_grid
        plot_grid([(str(role), tick, op.kind, op.layer, op.micro) for role, _, tick, op in cells], args.plot)
    return 0
