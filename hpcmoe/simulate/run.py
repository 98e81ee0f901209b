"""What `hpcmoe simulate` does: reads what it is told, has the schedule clocked, makes the report of it."""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np

from hpcmoe import placing
from hpcmoe.cluster.clusterfile import ClusterFile, read_cluster
from hpcmoe.cluster.kernels import Calibration, find_calibration, read_calibration, same_kind
from hpcmoe.cluster.network import Network
from hpcmoe.compute.base import Sizes
from hpcmoe.config import JobConfig, ModelConfig
from hpcmoe.data.requests import read_requests
from hpcmoe.data.tokenizer import Tokenizer
from hpcmoe.data.weights import WeightsFile
from hpcmoe.errors import EXIT_OK, UserError, at
from hpcmoe.files import check_folder
from hpcmoe.jobfile import read_job
from hpcmoe.parallel import plan
from hpcmoe.parallel.check import check
from hpcmoe.parallel.layout import Layout, choose
from hpcmoe.parallel.schedule import Role, Schedule, build
from hpcmoe.report import metrics, table, trace
from hpcmoe.report.record import RankRecord
from hpcmoe.simulate.alike import alike
from hpcmoe.simulate.choice import ExchangeTrial, exchange_trial
from hpcmoe.simulate.clock import Clock
from hpcmoe.simulate.cores import Cores, Machine
from hpcmoe.simulate.durations import Durations
from hpcmoe.simulate.facts import simulated_facts
from hpcmoe.simulate.group import Group, Setting
from hpcmoe.simulate.loads import read_shares
from hpcmoe.simulate.memory import Held, fit, nearest, shard_of
from hpcmoe.simulate.modelfile import read_model
from hpcmoe.simulate.records import records_of
from hpcmoe.simulate.staged import network_of
from hpcmoe.simulate.ways import Ways
from hpcmoe.simulate.workload import even_rounds, feed, handed_out, works_of


class Told(NamedTuple):
    """All that a simulation is told. lengths: prompt and output tokens of each request; share_le: of each layer's rows the share of each
    expert, load: in words; warnings: what the user should know of it; drawn: the share of tokens that are drawn (sampled with a temperature);
    node_of_rank: where ranks lie (None: along the nodes)."""

    job: JobConfig
    model: ModelConfig
    cluster: ClusterFile
    calibration: Calibration
    gpus: int
    lengths: list[tuple[int, int]]
    share_le: np.ndarray
    load: str
    warnings: list[str]
    drawn: float = 0.0
    node_of_rank: tuple[int, ...] | None = None

    @property
    def gpu(self) -> bool:
        """Whether ranks are GPUs: as run.device says, or what the calibration is of: more than one unit shares a product."""
        device = self.job.run.device
        return device == "gpu" if device != "auto" else self.calibration.gemm.units > 1

    def nodes(self) -> np.ndarray:
        """The node of each rank."""
        return np.arange(self.gpus) // self.cluster.nodes.ranks_per_node if self.node_of_rank is None else np.array(self.node_of_rank)

    def cores(self) -> list[Machine]:
        """The cores of each node, where its ranks share them; else nothing."""
        c = self.cluster.cores
        return [Machine(int(ranks), c.per_node, c.together, c.look_us * 1e-6, c.pause_us * 1e-6) for ranks in np.bincount(self.nodes())] if c and not self.gpu else []


class Simulated(NamedTuple):
    """What came of it. sizes: of the batch; leaders: of a stage; hierarchical: the transport, else rows go straight to their experts; trial:
    by which it was chosen, where it was left open and nodes matter."""

    told: Told
    layout: Layout
    why: str
    schedule: Schedule
    sizes: Sizes
    leaders: int
    network: Network
    groups: list[Group]
    records: list[RankRecord]
    hierarchical: bool = False
    trial: ExchangeTrial | None = None


def run(args) -> int:
    """Runs `simulate`; its exit code. Raises UserError for whatever the user can mend."""
    told = read(args)
    for warning in told.warnings:
        print(f"hpcmoe: warning: {warning}", file=sys.stderr, flush=True)
    if args.output:
        check_folder(args.output)
    done = simulate(told)
    report = metrics.metrics(done.records, simulated_facts(done, args.cluster))
    print(table.render(report))
    if args.trace:
        print(f"trace in {trace.write_trace(args.trace, done.records)}")
    if args.output:
        print(f"report in {table.write_report(args.output, report)}")
    return EXIT_OK


# ---------------------------------------------------------------- what it is told
def read(args) -> Told:
    """Reads and checks everything."""
    model, cluster = read_model(args.model), read_cluster(args.cluster, simulate=True)
    job = _job(args)
    path = args.calibration or find_calibration(cluster.calibration, args.cluster)
    calibration = read_calibration(path)
    gpus = cluster.ranks if args.gpus is None else args.gpus
    if not 1 <= gpus <= cluster.ranks:
        raise at("command line", "--gpus", gpus, f"1 to {cluster.ranks}: {args.cluster} has nodes.count = {cluster.nodes.count} of "
                 f"nodes.ranks_per_node = {cluster.nodes.ranks_per_node}")
    share_le, load = read_shares(args.load, model, job.run.batch_tokens)
    lengths, drawn = _lengths(args, job, model)
    told = Told(job, model, cluster, calibration, gpus, lengths, share_le, load, _warnings(args, cluster, calibration), drawn)
    _check_dtype(told, str(path))
    if job.run.transport == "staged" and not told.gpu:
        raise at("simulate", "run.transport", "staged", "another one: it is modelled for GPUs, whose rows it copies through the host")
    return told


def _job(args) -> JobConfig:
    """The job that a run would have."""
    for text in args.sets:
        key = text.partition("=")[0].strip()
        if key in ("task", "weights.file") or key.startswith("output."):
            raise at("command line", "--set", text, "a key that is not said otherwise: the model is MODEL, the work --requests or --sequences")
    if args.requests and any(n is not None for n in (args.sequences, args.prompt_tokens, args.output_tokens)):
        raise at("command line", "--requests", args.requests, "either this or --sequences, --prompt-tokens, --output-tokens")
    sets = [*args.sets, f"weights.file={args.model}", f"task={'generate' if args.requests else 'throughput'}"]
    short = {"requests.file": args.requests, "throughput.sequences": args.sequences, "throughput.prompt_tokens": args.prompt_tokens,
             "throughput.output_tokens": args.output_tokens, "output.dir": args.output, "output.trace": args.trace}
    job = read_job(None, sets + [f"{key}={value}" for key, value in short.items() if value is not None])
    run_ = job.run
    for name in ("capacity_factor", "rebalance_every"):
        if getattr(run_, name):
            raise at("command line", f"run.{name}", getattr(run_, name), "0: it is not modelled in this version")
    return job


def _lengths(args, job: JobConfig, model: ModelConfig) -> tuple[list[tuple[int, int]], float]:
    """(prompt and output tokens of each request, the share of them whose tokens are drawn)."""
    if not args.requests:
        batch = job.throughput
        longest = batch.prompt_tokens + batch.output_tokens
        if longest > model.context:
            raise at("command line", "--prompt-tokens and --output-tokens", longest, f"at most {model.context}, the model's context")
        return [(batch.prompt_tokens, batch.output_tokens)] * batch.sequences, 0.0
    requests = read_requests(job.requests.file, _tokenizer(args.model, model), job.sampling, model, job.task, job.run.context, job.requests.limit)
    good = [r for r in requests if not r.error]
    if not good:
        raise UserError(f"{job.requests.file}: none of its {len(requests)} requests can run; the first: line {requests[0].line}: {requests[0].error}")
    return [(len(r.tokens), r.max_tokens) for r in good], float(np.mean([r.temperature > 0 for r in good]))


def _tokenizer(path: str, model: ModelConfig) -> Tokenizer | None:
    if not path.endswith((".h5", ".hdf5")):
        return None
    with WeightsFile(path) as file:
        return Tokenizer.from_json(file.tokenizer_json, file.chat_template, file.special, model.bos_id) if file.tokenizer_json else None


def _warnings(args, c: ClusterFile, calibration: Calibration) -> list[str]:
    """Where the calibration is not of the cluster's ranks."""
    found, peak = [], calibration.gemm.units * calibration.gemm.unit_gflop_per_s / 1e3
    if args.calibration:
        own = read_calibration(find_calibration(c.calibration, args.cluster)).machine
        if not same_kind(own, calibration.machine):
            found.append(f"{args.calibration} is of {calibration.machine!r}; {args.cluster} names a calibration of {own!r}")
    if not 0.8 < peak / c.rank.tflop_per_s < 1.25:
        found.append(f"the calibration is of {calibration.machine!r}, whose products reach {peak:.4g} TFLOP/s at most; "
                     f"a rank of {c.name!r} has rank.tflop_per_s = {c.rank.tflop_per_s:g}")
    return found


def _check_dtype(told: Told, path: str) -> None:
    dtype, item = told.job.weights.dtype, told.calibration.gemm.item_bytes
    if dtype != "auto" and (4 if dtype == "fp32" else 2) != item:
        raise at("command line", "weights.dtype", dtype, f"a type of {item} bytes, which {path} was made with, or auto")


# ---------------------------------------------------------------- the simulation
def simulate(told: Told) -> Simulated:
    """Clocks the run that the engine would make of this job. Raises UserError where layout or batch do not fit the cluster."""
    model, c, job = told.model, told.cluster, told.job
    layout, why = choose(job.layout, told.gpus, model)
    node_of_rank = told.nodes()
    network, gpu, item = network_of(c, node_of_rank, told.calibration, job.run.transport), told.gpu, told.calibration.gemm.item_bytes
    sizes, held = _room(told, layout, item)
    cut = plan.cut(job.run, layout, gpu)
    schedule = build(plan.schedule_name(job.run, gpu), layout.pp, model.layers, cut.micros, cut.lanes, layout.tp > 1)
    check(schedule)
    local = shard_of(model, layout.tp).model if layout.tp > 1 else model
    durations = Durations(told.calibration, local, model, gpu, job.run.graphs, job.run.dispatch_dtype == "fp8", told.drawn)
    expert_ls = placing.expert_ls(placing.placement_of(job, model, layout), model, layout)
    trial = _trial(told, layout, network, durations)
    hierarchical = trial.hierarchical if trial else job.run.transport == "hierarchical"
    setting = Setting(model, layout, schedule, durations, slot_shares(told, expert_ls), cut.micros, bool(job.output.trace),
                      hierarchical, expert_ls, bool(told.cores()))
    groups, indices = _groups(told, setting, network, sizes)
    Clock([crew for group in groups for crew in group.running], network.bandwidth_l, Cores(told.cores())).run()
    for group in groups:
        group.join()
    records = [record for group, mine in zip(groups, indices)
               for record in records_of(group, network, held, mine, "GPU" if gpu else "CPU")]
    leaders = len(layout.leader_places(node_of_rank, 0)[0])
    return Simulated(told, layout, why, schedule, sizes, leaders, network, groups, records, hierarchical, trial)


def _trial(told: Told, layout: Layout, network: Network, durations: Durations) -> ExchangeTrial | None:
    """Of the exchanges, where the job leaves the transport open and some stage has several ranks on several nodes."""
    run_ = told.job.run
    if run_.transport != "auto" or not plan.nodes_matter(layout, network.node_r.tolist()):
        return None
    leaders = len(layout.leader_places(network.node_r, 0)[0])
    most = max(map(len, plan.hand_out(works_of(told.lengths), leaders * layout.dp)))
    rows = plan.usual_rows(run_, told.job.task, leaders, most, plan.cut(run_, layout, told.gpu))
    return exchange_trial(network, layout, told.model, durations, alike(layout, network, [()] * layout.dp), rows)


def _room(told: Told, layout: Layout, item: int) -> tuple[Sizes, dict[Role, Held]]:
    """The batch, as far as it fits in memory. Raises UserError with the nearest layout that does."""
    job, c = told.job, told.cluster

    def wanted(layout_: Layout) -> tuple[Sizes, int]:
        nodes = told.nodes() if layout_.size == told.gpus else np.arange(layout_.size) // c.nodes.ranks_per_node
        leaders = len(layout_.leader_places(nodes, 0)[0])
        most = max(map(len, plan.hand_out(works_of(told.lengths), leaders * layout_.dp)))
        context = job.run.context or max(map(sum, told.lengths))
        return plan.limits(job.run, told.model, layout_, leaders, most, plan.cut(job.run, layout_, told.gpu), context), leaders

    def fits(layout_: Layout) -> bool:
        try:
            fit(c, told.model, layout_, job.run, *wanted(layout_), item, told.gpu)
        except UserError:
            return False
        return True

    mine = wanted(layout)
    try:
        return fit(c, told.model, layout, job.run, *mine, item, told.gpu)
    except UserError as error:
        raise UserError(f"{error}; {nearest(layout, told.model, told.gpus, c.ranks, fits)}") from error


def slot_shares(told: Told, expert_ls: np.ndarray) -> np.ndarray:
    """Of each layer's rows the share of each slot [l, s]: an expert's rows go to its copies alike."""
    copies_le = np.stack([np.bincount(expert_s, minlength=told.model.router.experts) for expert_s in expert_ls])
    return np.take_along_axis(told.share_le / np.maximum(copies_le, 1), expert_ls, axis=1)


def _groups(told: Told, setting: Setting, network: Network, sizes: Sizes) -> tuple[list[Group], list[dict[int, list[list[int]]]]]:
    """Replicas that are alike together; for each group, its replicas' requests by leader."""
    layout, run_ = setting.layout, told.job.run
    leaders_dp = [layout.leader_places(network.node_r, dp) for dp in range(layout.dp)]
    leaders_of, rest = [len(leaders_p[0]) for leaders_p in leaders_dp], (sizes, run_.prefill_chunk, told.model.attention.window)
    if setting.sharing and layout.dp > 1:  # replicas that share cores are not clocked as one: each with what it takes from the list
        feed_dj, index_dj = handed_out(told.lengths, leaders_of, *rest)
        alike_dp = [[dp] for dp in range(layout.dp)]
    else:
        dealt, made = iter(plan.hand_out(works_of(told.lengths), sum(leaders_of))), {}
        index_dj = [[[w.index for w in next(dealt)] for _ in range(count)] for count in leaders_of]
        work_dp = [tuple(tuple(told.lengths[i] for i in index) for index in index_j) for index_j in index_dj]
        alike_dp = alike(layout, network, work_dp)
        for key in (key for members in alike_dp for key in work_dp[members[0]]):
            if key not in made:
                made[key] = feed(list(key), *rest)
        feed_dj = {members[0]: [made[key] for key in work_dp[members[0]]] for members in alike_dp}
    groups, indices = [], []
    for number, members in enumerate(alike_dp):
        ways = Ways(network, layout, members, leaders_dp[members[0]], setting.share_ls.shape[1])
        groups.append(Group(number, setting, ways, leaders_dp[members[0]], even_rounds(feed_dj[members[0]])))
        indices.append({dp: index_dj[dp] for dp in members})
    return groups, indices
