"""`hpcmoe run`: from a job's configuration to outputs and report, on all ranks."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np

from hpcmoe import linear, memory
from hpcmoe.config import JobConfig, ModelConfig
from hpcmoe.data.outputs import Result, output_text, write_outputs
from hpcmoe.data.loadfile import write_load
from hpcmoe.data.requests import Request, read_requests, synthetic_requests
from hpcmoe.data.tokenizer import Tokenizer, text_installed
from hpcmoe.data.weights import WeightsFile
from hpcmoe.device import gpus
from hpcmoe.errors import EXIT_OK, UserError
from hpcmoe.facts import job_facts
from hpcmoe.files import check_folder
from hpcmoe.parallel import exchange, holdings, layout as layouts, plan
from hpcmoe.parallel.batch import Batcher, Work
from hpcmoe.parallel.check import check
from hpcmoe.parallel.engine import Engine, aligned_clock
from hpcmoe.parallel.layout import Layout
from hpcmoe.parallel.schedule import Role, build
from hpcmoe.parallel.stage import Limits, Stage
from hpcmoe.parallel.world import Tally, World, agree, on_root
from hpcmoe.report.progress import Progress
from hpcmoe.report.record import RankRecord, RequestTimes, StepRow


@dataclass
class Prepared:
    """What rank 0 makes of a job before anything is loaded. requests and tokenizer stay there."""

    job: JobConfig
    model: ModelConfig
    layout: Layout
    why: str
    context: int
    requests: list[Request] = field(default_factory=list)
    tokenizer: Tokenizer | None = None

    def public(self) -> "Prepared":
        return Prepared(self.job, self.model, self.layout, self.why, self.context)


def run(comm, job: JobConfig, failure_point, started_s: float) -> int:
    """Runs a job on the ranks of `comm`; the exit code. started_s: time.monotonic() of the program's start.

    Raises AgreedError, the same on all ranks, for whatever the user can mend.
    """
    mine = None

    def prepare():
        nonlocal mine
        mine = _prepare(job, comm.size)
        return mine.public()

    shared = on_root(comm, prepare)
    say = _say if comm.rank == 0 and not job.output.quiet else lambda text: None
    say(f"layout {shared.layout}: {shared.why}")
    if gpus():
        say(f"{len(gpus())} GPU(s) are visible here and are not used: this version computes on CPUs")
    session = Session(comm, shared, mine, failure_point, say)
    session.load()
    results = session.execute(started_s)
    return on_root(comm, session.write, results)


def _say(text: str) -> None:
    print(f"hpcmoe: {text}", file=sys.stderr, flush=True)


def _prepare(job: JobConfig, ranks: int) -> Prepared:
    """Reads and checks all that can be checked before weights are loaded."""
    check_folder(job.output.dir)
    if job.output.trace:
        check_folder(os.path.dirname(job.output.trace) or ".")
    linear.choose(job.weights.backend, job.weights.dtype)
    with WeightsFile(job.weights.file) as file:
        model = file.config
        layout, why = layouts.choose(job.layout, ranks, model)
        tokenizer = None
        if file.tokenizer_json and (text_installed() or _has_text(job)):
            tokenizer = Tokenizer.from_json(file.tokenizer_json, file.chat_template, file.special, model.bos_id)
    if job.run.context > model.context:
        raise UserError(f"job: run.context = {job.run.context}: expected at most the model's {model.context} tokens")
    if job.task == "throughput":
        requests = synthetic_requests(job.throughput, model)
    else:
        requests = read_requests(job.requests.file, tokenizer, job.sampling, model, job.task, job.run.context, job.requests.limit)
    longest = max((len(r.tokens) + r.max_tokens for r in requests if not r.error), default=0)
    if longest == 0:
        first = requests[0]
        path = write_outputs(job.output.dir, job.task, requests, [], tokenizer, os.path.basename(job.weights.file))
        raise UserError(f"{job.requests.file}: none of its {len(requests)} requests can run; the first: "
                        f"line {first.line}: {first.error} (the others: {path})")
    return Prepared(job, model, layout, why, job.run.context or longest, requests, tokenizer)


def _has_text(job: JobConfig) -> bool:
    """Whether a job cannot do without a tokenizer."""
    return job.task != "throughput" and not job.requests.file.endswith((".h5", ".hdf5"))


def to_work(r: Request) -> Work:
    """The part of a request that leaders need."""
    return Work(r.index, r.tokens, r.max_tokens, r.temperature, r.top_k, r.top_p, r.seed, tuple(r.stop_ids), r.logprobs)


class Session:
    """One run on one rank: communicators, weights, requests, the engine, what came of it."""

    def __init__(self, comm, shared: Prepared, mine: Prepared | None, failure_point, say):
        self.comm, self.shared, self.mine, self.say = comm, shared, mine, say
        self.job, self.model, self.layout = shared.job, shared.model, shared.layout
        self.failure_point = failure_point
        self.cut = plan.cut(self.job.run, self.layout, on_gpu=False)
        self.world = world = World(comm, self.layout, self.cut.lanes)
        self.schedule = build(self.job.run.schedule, self.layout.pp, self.model.layers, self.cut.micros, self.cut.lanes)
        if comm.rank == 0:
            check(self.schedule)
        world.transport = exchange.choose(world.lanes[0], comm, self.job.run.transport)
        here = world.here
        self.record = RankRecord(
            comm.rank, world.hosts[comm.rank], world.node_of_rank[comm.rank], here.dp, here.stage, here.place,
            world.leader is not None, list(self.layout.layers_of(here.stage, self.model.layers)),
            list(self.layout.experts_of(here.place, self.model.router.experts)))
        self.works = self._hand_out()

    def _hand_out(self) -> list[Work]:
        """This leader's requests: rank 0 deals them to the leaders of all replicas."""
        places = self.comm.gather((self.world.here, self.world.leader))
        parts = None
        if self.comm.rank == 0:
            leaders = len(self.world.leaders)
            works = [to_work(r) for r in self.mine.requests if not r.error]
            dealt = plan.hand_out(works, self.layout.dp * leaders)
            ends = (0, self.layout.pp - 1)
            parts = [dealt[here.dp * leaders + leader] if leader is not None and here.stage in ends else []
                     for here, leader in places]
            self.counts = [len(part) for part in dealt]
        return self.comm.scatter(parts)

    # ------------------------------------------------------------ before the run
    def load(self) -> None:
        """Reads this rank's weights and fixes the sizes of the run. Raises AgreedError."""
        start = time.monotonic()
        self.held = agree(self.comm, self._read_weights)
        self.record.load_s = time.monotonic() - start
        self.record.weights_bytes = self.held.nbytes
        self.limits = self._limits()
        self.say(f"weights loaded in {self.record.load_s:.2f} s; transport {self.world.transport}; "
                 f"{self.job.run.schedule} schedule, {self.cut.micros} micro-batch(es), {self.cut.lanes} lane(s); "
                 f"{self.limits.slots * self.limits.micros * len(self.world.leaders)} sequences at once per replica")

    def _read_weights(self):
        world, weights = self.world, self.job.weights
        self.backend = linear.choose(weights.backend, weights.dtype)
        with WeightsFile(weights.file, weights.verify) as file:
            share = holdings.Share(self.record.layers, self.record.experts, world.leader is not None,
                                   world.first_stage, world.last_stage)
            held = holdings.load(file, self.model, self.backend, share, self.shared.context)
            self.record.bytes_read = file.bytes_read
            self.file_bytes = os.path.getsize(weights.file)
        return held

    def _limits(self) -> Limits:
        leaders = len(self.world.leaders)
        most = self.comm.bcast(max(self.counts) if self.comm.rank == 0 else None)
        wanted = agree(self.comm, plan.limits, self.job.run, self.layout, leaders, most, self.cut, self.shared.context)
        fitting = agree(self.comm, self._fit, wanted, leaders)
        slots = min(self.comm.allgather(fitting))
        if slots < wanted.slots:
            self.say(f"KV cache: {slots} instead of {wanted.slots} sequences per leader and micro-batch fit in memory")
        return wanted._replace(slots=slots)

    def _fit(self, wanted: Limits, leaders: int) -> int:
        if self.world.leader is None:
            return wanted.slots
        free = memory.available() // self.world.ranks_on_node
        return plan.fit_slots(self.model, len(self.record.layers), wanted, self.job.run, free, leaders,
                              f"rank {self.comm.rank}")

    # ------------------------------------------------------------ the run
    def execute(self, started_s: float) -> list[Result]:
        """Runs all rounds; on rank 0 the results of all requests (unsorted) and self.records."""
        job, world = self.job, self.world
        clock = aligned_clock(self.comm)
        batcher = None
        if world.first_stage and world.leader is not None:
            batcher = Batcher(self.works, self.limits.micros, self.limits.slots, self.limits.rows, job.run.prefill_chunk,
                              job.task == "score", clock)
        stage = Stage(self.model, world, self.held, self.limits, self.works, batcher, self.record)
        crowded = world.ranks_on_node * self.backend.threads > memory.cores()
        waiter = exchange.Waiter(crowded, job.run.stall_s)
        program = self.schedule.programs[Role(world.here.stage, world.leader is not None)]
        engine = Engine(program, stage.table(), waiter, self.record, clock, bool(job.output.trace), self.failure_point)
        loads = []
        tally = Tally(world)
        self.startup_s = time.monotonic() - started_s
        with self._progress() as progress:
            def tell() -> None:
                progress.update(*tally.update(stage.done, stage.tokens_out, clock()))

            def after_round(number: int) -> None:
                loads.append(stage.load_le)
                stage.load_le = np.zeros_like(stage.load_le)
                tell()

            engine.run(lambda: stage.alive, after_round)
            tally.all_done(tell)
        self.record.load = np.array(loads)
        self.record.kv_bytes = stage.cache.nbytes if stage.cache else 0
        self.record.buffer_bytes = sum(s.nbytes for s in stage.scratch)
        self.record.peak_rss_bytes = memory.peak_rss()
        return self._gather(batcher)

    def _progress(self) -> Progress:
        quiet = self.comm.rank > 0 or self.job.output.quiet
        return Progress(sum(self.counts) if self.comm.rank == 0 else 0, quiet=quiet)

    def _gather(self, batcher: Batcher | None) -> list[Result]:
        results = []
        for s in batcher.finished if batcher else []:
            index = s.work.index
            scored = self.job.task == "score"
            logprobs = np.concatenate(s.logprobs) if scored else np.array(s.logprobs) if s.work.logprobs else None
            results.append(Result(index, np.array(s.output, dtype=np.int32), logprobs, s.finish))
            self.record.requests.append(RequestTimes(index, len(s.work.tokens), len(s.output), s.admitted_s,
                                                     s.first_token_s, s.end_s))
        if batcher:
            self.record.steps = [StepRow(*row) for row in batcher.steps]
        gathered = self.comm.gather((self.record, results))
        if self.comm.rank:
            return []
        self.records = [record for record, _ in gathered]
        return [result for _, part in gathered for result in part]

    # ------------------------------------------------------------ after the run (rank 0)
    def write(self, results: list[Result]) -> int:
        """Outputs, report and trace; the exit code. Raises UserError where a file cannot be written."""
        from hpcmoe.report import metrics, table, trace
        job, requests, tokenizer = self.job, self.mine.requests, self.mine.tokenizer
        failed = [r for r in requests if r.error]
        report = metrics.metrics(self.records, job_facts(self, len(failed)))
        path = self._write_outputs(results)
        write_load(job.output.dir, self.records, self.model, self.layout.dp)
        if job.output.trace:
            trace.write_trace(job.output.trace, self.records)
        if job.output.show_text:
            _show(requests, results, tokenizer)
        report_path = table.write_report(job.output.dir, report)
        if not job.output.quiet:
            print(table.render(report), flush=True)
        for r in failed[:5]:
            self.say(f"{job.requests.file}: line {r.line}: {r.error}")
        if failed:
            self.say(f"{len(failed)} of {len(requests)} requests did not run: their rows in {path} say why")
        self.say(f"outputs in {path}, report in {report_path}" + (f", trace in {job.output.trace}" if job.output.trace else ""))
        return EXIT_OK

    def _write_outputs(self, results: list[Result]):
        """outputs.jsonl; where it cannot be written after all, hours of work are saved in a folder for temporary files."""
        job, mine = self.job, self.mine
        rest = (job.task, mine.requests, results, mine.tokenizer, os.path.basename(job.weights.file))
        try:
            return write_outputs(job.output.dir, *rest)
        except UserError as error:
            try:
                path = write_outputs(tempfile.mkdtemp(prefix="hpcmoe-saved-"), *rest)
            except (UserError, OSError) as second:
                raise UserError(f"{error}; nor could the outputs be saved elsewhere: {second}") from error
            raise UserError(f"{error}; the outputs are saved in {path} of host {self.record.host}") from error


def _show(requests: list[Request], results: list[Result], tokenizer: Tokenizer | None) -> None:
    """Prompt and generated text of each request, on standard output."""
    of = {result.index: result for result in results}
    for r in requests:
        if r.index not in of:
            continue
        if tokenizer is None:
            prompt, text = r.tokens.tolist(), of[r.index].tokens.tolist()
        else:
            prompt, (text, _) = tokenizer.decode(r.tokens), output_text(r, of[r.index], tokenizer)
        print(f"--- {r.custom_id or r.index}\n{prompt} >>>{text}\n")
