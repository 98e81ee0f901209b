"""The command line of `hpcmoe calibrate`."""

from __future__ import annotations

import argparse
import sys

from hpcmoe.errors import EXIT_FAILED, EXIT_OK, UserError

EXAMPLES = """examples:
  OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 hpcmoe calibrate measure --output mine.toml
  hpcmoe calibrate measure --gpu --output h200.toml --raw h200.json
  hpcmoe calibrate fit-gpu h200.json --output h200.toml --base inputs/calibrations/h200_sxm.toml
  OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 mpiexec -n 2 hpcmoe calibrate links --calibration mine.toml --output here.toml
  hpcmoe calibrate compare inputs/comparisons/demo.toml --cluster here.toml
  hpcmoe calibrate fit-gemm h100_sxm_gemm_bf16.csv --chip h100_sxm --hold-out 5120,14336,3584
  hpcmoe calibrate fit-links h100_sxm_nccl_fp16.csv --port-gb-per-s 450 --hold-out 4
  hpcmoe calibrate check inputs/calibrations/h100_sxm.toml --table h100_sxm_gemm_bf16.csv --hold-out 5120,14336,3584
  hpcmoe calibrate check inputs/calibrations/h100_sxm.toml --moe h100_sxm_moe_bf16.csv
"""


def add_parser(subparsers) -> None:
    """Adds `calibrate` and its sub-commands."""
    p = subparsers.add_parser("calibrate", help="numbers for the simulator: what kernels and links take", epilog=EXAMPLES,
                              formatter_class=argparse.RawDescriptionHelpFormatter,
                              description="Numbers for the simulator, and how far they are off.")
    commands = p.add_subparsers(dest="calibrate_command", required=True, metavar="COMMAND")
    _add_measuring(commands)
    _add_comparing(commands)
    _add_fitting(commands)


def _add_measuring(commands) -> None:
    """`measure` and `fit-gpu`: a calibration file."""
    measured = commands.add_parser("measure", help="measure this machine's CPU or GPU and write a calibration file",
                                   description="Measures products, attention and passes over rows as a rank on one core makes them, in "
                                   "about half a minute, writes a calibration file, and prints its error, also on cases held out. "
                                   "--gpu: as a rank on a GPU makes them, also launches, graphs, waits, copies and the engine's own time.")
    measured.add_argument("--output", required=True, metavar="FILE", help="the calibration file")
    measured.add_argument("--backend", choices=("auto", "numpy", "onednn"), default="auto", help="as weights.backend (default auto)")
    measured.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of products (default fp32; with --gpu bf16)")
    measured.add_argument("--machine", default="", metavar="NAME", help="what to call the machine (default: its processor, or GPU)")
    measured.add_argument("--gpu", action="store_true", help="the first visible GPU; exit code 1 where something was not measured")
    measured.add_argument("--raw", default="", metavar="FILE", help="with --gpu: all that was measured, for fit-gpu (default: the output's name "
                          "with .json)")
    measured.add_argument("--scale", choices=("full", "small"), default="full", help="with --gpu: small: to try the program; no measurement")
    measured.set_defaults(handler=_measure)
    fitted = commands.add_parser("fit-gpu", help="fit a calibration file to what was measured on a GPU",
                                 description="Fits a calibration file to the times that `calibrate measure --gpu` or `bench gpu --only "
                                 "calibrate` wrote; needs no GPU.")
    fitted.add_argument("raw", help="the .json file")
    fitted.add_argument("--output", required=True, metavar="FILE", help="the calibration file")
    fitted.add_argument("--machine", default="", metavar="NAME", help="what to call the machine (default: the GPU's name)")
    fitted.set_defaults(handler=_fit_gpu)
    for one in (measured, fitted):
        one.add_argument("--base", default="", metavar="FILE", help="a GPU's calibration file: its numbers stand for what was not measured")


def _add_comparing(commands) -> None:
    """`links` and `compare`: a cluster file of this machine, and real runs beside predictions."""
    here = commands.add_parser("links", help="measure exchanges and shared cores of the ranks of this job, and write a cluster file",
                               description="Under mpiexec: measures what exchanges and waiting take between the ranks of a node, what its cores carry "
                               "together, and what links between nodes do, in some seconds, and writes a cluster file that names a calibration.")
    here.add_argument("--calibration", required=True, metavar="FILE", help="kernels of a rank here, from calibrate measure; the cluster file names it")
    here.add_argument("--output", required=True, metavar="FILE", help="the cluster file")
    here.add_argument("--ranks-per-node", type=int, default=16, metavar="N", help="most ranks of a job on a node (default 16)")
    here.add_argument("--name", default="this machine", metavar="NAME", help="of the cluster (default: this machine)")
    here.set_defaults(handler=_links)
    compare = commands.add_parser("compare", help="real runs on this machine beside what the simulator predicts of them",
                                  description="Runs every setting of a comparison file, on one rank or under mpiexec, and prints tokens/s, TPOT and "
                                  "phases beside the prediction that each run's report carries.")
    compare.add_argument("comparison", help="a comparison file (inputs/comparisons/*.toml)")
    compare.add_argument("--cluster", required=True, metavar="FILE", help="this machine's cluster file, from calibrate links")
    compare.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each setting, by turns; the one in the middle counts (default 3)")
    compare.add_argument("--only", default="", metavar="TEXT", help="only settings whose name contains this text")
    compare.add_argument("--mpiexec", default="", metavar="COMMAND", help="launcher (default: the one beside this Python, or on the path)")
    compare.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    compare.set_defaults(handler=_compare)


def _add_fitting(commands) -> None:
    """`fit-gemm`, `fit-links` and `check`: tables of measurements."""
    gemm = commands.add_parser("fit-gemm", help="fit the model of dense products to a table of measured ones",
                               description="Prints [gemm] of a calibration file, and its error on rows that it was fitted to and "
                               "on rows held out.")
    gemm.add_argument("table", help="CSV with columns m, n, k, latency_ms, or .json of bench gpu")
    gemm.add_argument("--chip", required=True, metavar="NAME", help="whose peaks are not fitted: h100_sxm, h200_sxm")
    gemm.set_defaults(handler=_fit_gemm)
    check = commands.add_parser("check", help="a calibration file against tables of measured products or MoE layers",
                                description="Prints the error of a calibration file's products, by rows m; or predicted / measured of MoE "
                                "layers of another engine, one GPU's share: median, 5th and 95th percentile.")
    check.add_argument("calibration", help="a calibration file (inputs/calibrations/*.toml)")
    which = check.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", metavar="FILE", help="CSV with columns m, n, k, latency_ms, or .json of bench gpu")
    which.add_argument("--moe", metavar="FILE", help="CSV with columns num_tokens, hidden_size, inter_size, topk, num_experts, moe_tp_size, "
                       "moe_ep_size, distribution, latency_ms")
    check.set_defaults(handler=_check)
    check.add_argument("--ungated", type=_sizes, default=(), metavar="N,N", help="with --moe: inter_size of experts that have no gate, that is two "
                       "matrices and not three")
    for one in (gemm, check):
        one.add_argument("--hold-out", type=_sizes, default=(), metavar="N,N", help="rows with n or k of these: not fitted, judged apart")
    links = commands.add_parser("fit-links", help="fit links within a node to a table of NCCL's collectives",
                                description="Prints for each collective what GPUs of a node reach over their links, and the error.")
    links.add_argument("table", help="CSV with columns op_name, num_gpus, elements_fp16, latency_ms")
    links.add_argument("--port-gb-per-s", type=float, required=True, metavar="GB/S", help="a GPU's port, each way: efficiency refers to it")
    links.add_argument("--hold-out", type=_sizes, default=(), metavar="N,N", help="rows with so many GPUs: not fitted, judged apart")
    links.set_defaults(handler=_fit_links)


def _sizes(text: str) -> tuple[int, ...]:
    """Of --hold-out: integers with commas between."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected integers with commas between") from None


def _two_parts(rows, held) -> tuple:
    """(rows to fit, rows held out). UserError where one of them would be empty."""
    if held.all() or (held.any() and (~held).sum() < 20):
        raise UserError("--hold-out leaves too few rows to fit: expected at least 20")
    return rows.where(~held), rows.where(held)


def _measure(args) -> int:
    if args.gpu:
        return _measure_gpu(args)
    if args.raw or args.base or args.dtype == "fp16" or args.scale != "full":
        raise UserError("--raw, --base, --scale and --dtype fp16 are for --gpu")
    import datetime
    import os

    from dataclasses import replace

    from hpcmoe import launch
    from hpcmoe.calibrate import ops
    from hpcmoe.calibrate.engine import measure_engine
    from hpcmoe.cluster import measure
    from hpcmoe.cluster.kernels import CallsModel, calibration_toml
    from hpcmoe.doctor import processor
    from hpcmoe.files import replacing

    def tell(text: str) -> None:
        print(text, flush=True)
    machine = args.machine or f"one core of {processor()}"
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    source = f"hpcmoe calibrate measure, {datetime.date.today().isoformat()}, {load}"
    dtype = args.dtype or "fp32"
    found = measure.measure(machine, source, args.backend, dtype, tell)
    timed = ops.measure_ops(args.backend, dtype, tell)
    plan_us, expert_plan_us, plan_rows = ops.measure_plans(args.backend, dtype)
    calls = ops.fit_calls(found.calibration, timed, CallsModel(plan_us=plan_us, expert_plan_us=expert_plan_us, plan_rows=plan_rows))
    engine = measure_engine(launch.start_mpi().COMM_SELF, replace(found.calibration, calls=calls), args.backend, dtype)
    rounded = {name: float(f"{value:.4g}") for name, value in {**vars(calls), **engine._asdict()}.items()}
    calls = CallsModel(**{**rounded, "plan_rows": plan_rows})
    tell(f"the engine: {calls.op_us:g} us of any op; a number of rows for the first time: {calls.plan_us:g} us of a product, "
         f"{calls.expert_plan_us:g} us of an expert")
    made = replace(found.calibration, calls=calls, processor=processor())
    found.errors.update({f"op {kind}": error for kind, error in ops.errors(made, timed).items()})
    width = max(map(len, found.errors))
    errors = [f"{title:<{width}}  {error}" for title, error in found.errors.items()]
    with replacing(args.output) as path, open(path, "w", encoding="utf-8") as file:
        file.write("".join(f"# {line}\n" for line in errors) + calibration_toml(made))
    print("\n".join(errors) + f"\ncalibration in {args.output}")
    return EXIT_OK


def _measure_gpu(args) -> int:
    from pathlib import Path

    from hpcmoe.bench import gpu
    from hpcmoe.bench.bed import Options
    if args.backend != "auto" or args.dtype == "fp32":
        raise UserError("--gpu: products are made by cuBLAS in bf16 or fp16: expected no --backend, and --dtype bf16 or fp16")
    args.raw = args.raw or str(Path(args.output).with_suffix(".json"))
    code = gpu.bench(args.raw, ["calibrate"], gpu.PARTS["calibrate"].seconds, Options(args.scale == "small", args.dtype or "bf16"))
    return max(code, _fit_gpu(args))


def _fit_gpu(args) -> int:
    """EXIT_FAILED where something was not measured."""
    from hpcmoe.cluster import gpu_fit
    from hpcmoe.cluster.kernels import read_calibration
    from hpcmoe.files import replacing
    base = read_calibration(args.base) if args.base else None
    found = gpu_fit.fit_gpu(gpu_fit.read_raw(args.raw))
    if args.machine:
        found = found._replace(machine=args.machine)
    with replacing(args.output) as path, open(path, "w", encoding="utf-8") as file:
        file.write(found.toml(base, args.base))
    for title, words in (found.errors | found.missing).items():
        print(f"{title:<28}  {words}")
    print(f"calibration in {args.output}")
    return EXIT_FAILED if found.missing else EXIT_OK


def _links(args) -> int:
    from hpcmoe import launch
    comm = launch.start_mpi().COMM_WORLD
    from hpcmoe.calibrate.links import measure_links
    from hpcmoe.parallel.watched import Watched
    from hpcmoe.parallel.world import node_names, on_root
    watched = Watched(comm)
    calibration = on_root(watched, _check_links, args)
    found = measure_links(watched, calibration, print if comm.rank == 0 else lambda text: None)
    on_root(watched, _write_links, args, found, comm.size, len(set(node_names(watched))))
    return EXIT_OK


def _check_links(args):
    """The calibration."""
    from hpcmoe.cluster.kernels import read_calibration
    if args.ranks_per_node < 1:
        raise UserError(f"--ranks-per-node {args.ranks_per_node}: expected a number >= 1")
    return read_calibration(args.calibration)


def _write_links(args, found, ranks: int, nodes: int) -> None:
    import datetime
    import os

    from hpcmoe import memory
    from hpcmoe.calibrate.links import cluster_toml
    from hpcmoe.cluster.kernels import read_calibration
    from hpcmoe.files import replacing
    gemm = read_calibration(args.calibration).gemm
    beside = os.path.relpath(os.path.abspath(args.calibration), os.path.dirname(os.path.abspath(args.output)))
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    source = f"hpcmoe calibrate links on {ranks} ranks of {nodes} node(s), {datetime.date.today().isoformat()}, {load}"
    text = cluster_toml(found, args.name, nodes, args.ranks_per_node, memory.available() / args.ranks_per_node / 2**30,
                        gemm.units * gemm.unit_gflop_per_s / 1e3, beside, source)
    with replacing(args.output) as path, open(path, "w", encoding="utf-8") as file:
        file.write(text)
    print(f"cluster file in {args.output}")


def _compare(args) -> int:
    from hpcmoe.calibrate import compare
    return compare.run(args)


def _fit_gemm(args) -> int:
    from hpcmoe.cluster import gemm_fit
    from hpcmoe.cluster.kernels import gemm_toml
    if args.chip not in gemm_fit.CHIPS:
        raise UserError(f"--chip {args.chip}: expected one of {', '.join(gemm_fit.CHIPS)}")
    rows = gemm_fit.read_products(args.table)
    fitted, held = _two_parts(rows, rows.held_out(args.hold_out))
    model = gemm_fit.fit(gemm_fit.CHIPS[args.chip], fitted, lambda i, rms: print(f"# {i}: root mean square of log {rms:.4f}", flush=True))
    print(gemm_toml(model) + f"\n# fitted    {gemm_fit.error(model, fitted)}")
    if len(held.m):
        print(f"# held out  {gemm_fit.error(model, held)}")
    return EXIT_OK


def _check(args) -> int:
    import numpy as np

    from hpcmoe.cluster import gemm_fit
    from hpcmoe.cluster.kernels import read_calibration, same_kind
    if args.moe:
        return _check_layers(args)
    calibration, rows = read_calibration(args.calibration), gemm_fit.read_products(args.table)
    model, there = calibration.gemm, gemm_fit.measured_on(args.table)
    if there and not same_kind(there, calibration.machine):
        print(f"hpcmoe: warning: {args.table} was measured on {there!r}; {args.calibration} is of {calibration.machine!r}", file=sys.stderr, flush=True)
    held = rows.held_out(args.hold_out)
    for m in np.unique(rows.m):
        print(f"m = {m:<6}  {gemm_fit.error(model, rows.where(rows.m == m))}")
    for title, part in (("others", ~held), ("held out", held)) if held.any() else (("all", ~held),):
        if part.any():
            print(f"{title:<10}  {gemm_fit.error(model, rows.where(part))}")
    return EXIT_OK


def _check_layers(args) -> int:
    from hpcmoe.cluster import moe_check
    from hpcmoe.cluster.kernels import read_calibration
    if args.hold_out:
        raise UserError("--hold-out is for --table: nothing was fitted to MoE layers")
    calibration, cases = read_calibration(args.calibration), moe_check.read_layers(args.moe, args.ungated)
    print("\n".join(moe_check.table(cases, moe_check.ratios(calibration, cases))).rstrip())
    return EXIT_OK


def _fit_links(args) -> int:
    import numpy as np

    from hpcmoe.cluster import links_fit
    if not args.port_gb_per_s > 0:
        raise UserError(f"--port-gb-per-s {args.port_gb_per_s}: expected a number > 0")
    rows = links_fit.read_collectives(args.table)
    for op in dict.fromkeys(rows.op.tolist()):
        mine = rows.where(rows.op == op)
        fitted, held = _two_parts(mine, np.isin(mine.gpus, args.hold_out))
        model = links_fit.fit_links(fitted)
        print(f"{op}: small messages {model.small_us:g} us + bytes / {model.small_gb_per_s:g} GB/s, large ones {model.large_us:g} us + "
              f"bytes / {model.large_gb_per_s:g} GB/s (efficiency {model.large_gb_per_s / args.port_gb_per_s:.3f}), and "
              f"{model.step_us:g} us per GPU beyond two\n  fitted    {links_fit.link_error(model, fitted)}")
        if len(held.op):
            print(f"  held out  {links_fit.link_error(model, held)}")
    return EXIT_OK
