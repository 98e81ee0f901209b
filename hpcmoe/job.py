"""`hpcmoe run`: from a job's configuration to outputs and report, on all ranks."""

from __future__ import annotations

import os
import sys
import tempfile
import time

import numpy as np

from hpcmoe import memory, placing, predicting
from hpcmoe.compute.base import Sizes
from hpcmoe.compute.footprint import weights_bytes
from hpcmoe.compute.holdings import Share
from hpcmoe.compute.step import Choices
from hpcmoe.config import JobConfig
from hpcmoe.data.outputs import Result, show_texts, write_outputs
from hpcmoe.data.loadfile import write_load
from hpcmoe.data.routing import write_routing
from hpcmoe.data.shards import ShardedFile
from hpcmoe.data.weights import WeightsFile
from hpcmoe.doing import END, HERE, RUN, SET_UP, WEIGHTS
from hpcmoe.errors import EXIT_OK, UserError
from hpcmoe.facts import job_facts
from hpcmoe.machine import open_machine
from hpcmoe.model.shard import Shard
from hpcmoe.parallel import lanes, moves, plan, trial
from hpcmoe.parallel.batch import Batcher, Pages
from hpcmoe.parallel.check import check
from hpcmoe.parallel.engine import Engine, aligned_clock
from hpcmoe.parallel.handle import NOTHING, Waiter
from hpcmoe.parallel.handout import HandOut
from hpcmoe.parallel.hierarchical import HIERARCHICAL, relay_sizes
from hpcmoe.parallel.rebalance import Rebalancer
from hpcmoe.parallel.schedule import Role, build
from hpcmoe.parallel.stage import Stage
from hpcmoe.parallel.timer import Timer
from hpcmoe.parallel.world import Tally, World, agree, node_names, on_root
from hpcmoe.prepare import Prepared, prepare, to_work
from hpcmoe.report.progress import Progress
from hpcmoe.report.record import RankRecord, RequestTimes, Seated, StepRow

IDLE_S = 0.001  # between rounds of a replica that has nothing until rank 0 answers: others may need its cores


def run(comm, job: JobConfig, failure_point, started_s: float) -> int:
    """Runs a job on the ranks of `comm`; the exit code. started_s: time.monotonic() of the program's start.

    Raises AgreedError, the same on all ranks, for whatever the user can mend.
    """
    mine = None

    def on_first():
        nonlocal mine
        mine = prepare(job, comm.size)
        return mine.public()

    shared = on_root(comm, on_first)
    say = _say if comm.rank == 0 and not job.output.quiet else lambda text: None
    say(f"layout {shared.layout}: {shared.why}")
    session = Session(comm, shared, mine, failure_point, say)
    session.load()
    results = session.execute(started_s)
    return on_root(comm, session.write, results)


def _say(text: str) -> None:
    print(f"hpcmoe: {text}", file=sys.stderr, flush=True)


class Session:
    """One run on one rank: communicators, weights, requests, the engine, what came of it."""

    def __init__(self, comm, shared: Prepared, mine: Prepared | None, failure_point, say):
        self.comm, self.shared, self.mine, self.say = comm, shared, mine, say
        self.job, self.model, self.layout = shared.job, shared.model, shared.layout
        self.failure_point = failure_point
        HERE.phase, HERE.hosts = SET_UP, (hosts := node_names(comm))
        self.machine = open_machine(comm, self.job, hosts, say)
        device, on_gpu = self.machine.device, self.machine.device.kind == "gpu"
        moves.check(self.job.run, self.layout, self.model)
        self.cut, self.lane_trial = plan.cut(self.job.run, self.layout, on_gpu), None
        self.open_cuts = lanes.open_cuts(self.job.run, self.layout, hosts, on_gpu)
        self.world = world = World(comm, self.layout, 2 if self.open_cuts else self.cut.lanes, hosts,
                                   bool(self.job.run.rebalance_every))
        self.crowded = world.ranks_on_node * self.machine.threads > memory.cores()
        self.batches = world.first_stage and world.leader is not None and not world.here.shard
        self._open_requests()
        rows = plan.usual_rows(self.job.run, self.job.task, len(world.leaders), self.hand_out.most, self.cut)
        trial.choose(world, self.job.run, self.model, device, self.machine.room(), rows, self.crowded, say)
        if on_gpu and world.transport == HIERARCHICAL:
            self.open_cuts = None  # a trial's rows have no place before the parcels: as many lanes as GPUs take anyhow
        here = world.here
        self.record = RankRecord(
            comm.rank, world.hosts[comm.rank], world.node_of_rank[comm.rank], here.dp, here.stage, here.place,
            world.leader is not None, list(self.layout.layers_of(here.stage, self.model.layers)),
            list(self.layout.slots_of(here.place, self.model.router.experts)), here.shard)
        self.record.device = self.machine.words
        shard = Shard.of(self.model, here.shard, self.layout.tp)
        self.local = shard.model  # the model as this rank sees it
        expert_ls = placing.expert_ls(shared.placement, self.model, self.layout)
        self.share = Share(self.record.layers, self.record.slots, world.leader is not None, world.first_stage, world.last_stage, shard,
                           expert_ls, world.leader or 0, len(self.record.slots) if self.job.run.rebalance_every else 0)
        self.record.seated = [Seated(0, expert_ls[np.ix_(self.record.layers, self.record.slots)])]

    def _open_requests(self) -> None:
        """What all leaders know of all requests, and the list that they are handed out from."""
        works = choices = None
        if self.comm.rank == 0:
            works = [to_work(r) for r in self.mine.requests if not r.error]
            choices = Choices.of(works, len(self.mine.requests))
        self.choices = self.comm.bcast(choices)
        self.hand_out = HandOut(self.comm, works, self.batches, self.layout.dp)

    # ------------------------------------------------------------ before the run
    def load(self) -> None:
        """Reads this rank's weights and fixes the sizes of the run. Raises AgreedError."""
        for first in (True, False):  # rank 0 compiles what the others then find on disk
            agree(self.comm, self._prepare_machine, first)
        start, HERE.phase = time.monotonic(), WEIGHTS
        self.held = agree(self.comm, self._read_weights)
        self.record.load_s = time.monotonic() - start
        self.record.weights_bytes = self.held.nbytes
        item, stored = (4 if dtype == "fp32" else 2 for dtype in (self.machine.dtype, self.shared.stored))
        self.record.weights_predicted_bytes = weights_bytes(self.local, self.share, item, stored, self.machine.device.kind == "gpu")
        HERE.phase = SET_UP
        self._choose_lanes()
        self._build_schedule()
        self._make_room()
        self.say(f"weights loaded in {self.record.load_s:.2f} s; transport {self.world.transport}; "
                 f"{self.schedule.name} schedule, {self.cut.micros} micro-batch(es), {self.cut.lanes} lane(s); "
                 f"{self.limits.slots * self.limits.micros * len(self.world.leaders)} sequences at once per replica")

    def _prepare_machine(self, first: bool) -> None:
        if first == (self.comm.rank == 0):
            self.machine.prepare(self.shared.stored, self.local, self.world.leader is not None)

    def _read_weights(self):
        weights = self.job.weights
        with WeightsFile(weights.file, weights.verify) as file:
            part = ShardedFile(file, self.share.shard) if self.layout.tp > 1 else file
            held = self.machine.load(part, self.local, self.share, self.shared.context)
            self.record.bytes_read = file.bytes_read
            self.file_bytes = os.path.getsize(weights.file)
        return held

    def _choose_lanes(self) -> None:
        """Where the job leaves the number of lanes open, by a trial of the experts that are here now. Raises AgreedError."""
        run, world, leaders = self.job.run, self.world, len(self.world.leaders)
        if self.open_cuts and run.max_sequences <= run.batch_tokens // leaders * leaders * self.open_cuts[0].micros:
            most = agree(self.comm, plan.limits, run, self.model, self.layout, leaders, self.hand_out.most, self.open_cuts[1], self.shared.context)
            compute = agree(self.comm, self.machine.compute, self.local, self.held, most, self.share, None, run)
            rows = plan.usual_rows(run, self.job.task, leaders, self.hand_out.most, self.open_cuts[0])
            self.cut, self.lane_trial = lanes.choose(world, compute, self.model.router, self._schedule_name, self.open_cuts, rows,
                                                     self.record.layers, self.crowded, self.say)
        world.keep_lanes(self.cut.lanes)

    @property
    def _schedule_name(self) -> str:
        return plan.schedule_name(self.job.run, self.machine.device.kind == "gpu")

    def _build_schedule(self) -> None:
        self.schedule = build(self._schedule_name, self.layout.pp, self.model.layers, self.cut.micros, self.cut.lanes, self.layout.tp > 1)
        if self.comm.rank == 0:
            check(self.schedule)

    def _make_room(self) -> None:
        """Fixes the sizes of the run, the same on all ranks, and allocates all that it needs. Raises AgreedError."""
        world, run = self.world, self.job.run
        leaders = len(world.leaders)
        wanted = agree(self.comm, plan.limits, run, self.model, self.layout, leaders, self.hand_out.most, self.cut, self.shared.context)
        choices = self.choices if world.leader is not None else None
        if world.transport == HIERARCHICAL:
            wanted = wanted._replace(relay=relay_sizes(world, self.model.router, wanted.rows))
        self.compute = agree(self.comm, self.machine.compute, self.local, self.held, wanted, self.share, choices, run)
        self.comm.Barrier()  # what is free is seen when all have their buffers
        fitting = agree(self.comm, self._fit, wanted, leaders)
        every = self.comm.allgather(fitting)
        self.limits = fitting._replace(slots=min(s.slots for s in every), pages=min(s.pages for s in every))
        agree(self.comm, self._open_cache)
        self.works = self.hand_out.start(self.limits)
        if self.limits.slots < wanted.slots:
            self.say(f"KV cache: {self.limits.slots} instead of {wanted.slots} sequences per leader and micro-batch fit in memory")
        if self.limits.pages:
            self.say(f"KV cache: {self.limits.pages} pages of {self.limits.page_tokens} tokens per leader")

    def _fit(self, wanted: Sizes, leaders: int) -> Sizes:
        lead = self.world.leader is not None
        ranks = self.world.ranks_on_node
        return self.machine.fit(wanted, self.local, len(self.record.layers) if lead else 0, self.job.run, ranks, leaders,
                                f"rank {self.comm.rank}")

    def _open_cache(self) -> None:
        if self.world.leader is not None:
            self.compute.open_cache(self.limits)

    # ------------------------------------------------------------ the run
    def execute(self, started_s: float) -> list[Result]:
        """Runs all rounds; on rank 0 the results of all requests (unsorted) and self.records."""
        job, world = self.job, self.world
        clock, batcher = aligned_clock(self.comm), None
        if self.batches:
            batcher = Batcher(self.works, self.limits.micros, self.limits.slots, self.limits.rows, job.run.prefill_chunk,
                              job.task == "score", clock, self._pages(), self.hand_out.supply)
        timer = Timer(self.machine.device, self.record, clock, bool(job.output.trace))
        stage = Stage(self.model, self.local, world, self.compute, self.limits, batcher, self.record, timer)
        program = self.schedule.programs[Role(world.here.stage, world.leader is not None)]
        waiter = Waiter(self.crowded)
        rebalancer = agree(self.comm, self._open_rebalancer, stage, waiter, clock) if job.run.rebalance_every else None
        engine = Engine(program, stage.table(), waiter, self.record, clock, bool(job.output.trace), self.failure_point,
                        lambda: rebalancer.handle if rebalancer else NOTHING)
        loads, tally = [], Tally(world)
        self.startup_s = time.monotonic() - started_s
        with self._progress() as progress:
            def tell() -> None:
                progress.update(*tally.update(stage.done, stage.tokens_out, clock()))
                self.hand_out.serve()

            def after_round(number: int) -> None:
                loads.append(stage.end_round())
                if rebalancer:
                    rebalancer.after_round(number, loads[-1], stage.agreed, stage.alive)
                tell()
                if batcher and batcher.alive and not batcher.busy and not loads[-1].any():
                    time.sleep(IDLE_S)

            HERE.phase = RUN
            engine.run(lambda: stage.alive, after_round)
            tally.all_done(tell)
        HERE.phase = END
        self.hand_out.close()
        stage.exchange.close()
        self.record.load = np.array(loads)
        if self.compute.capacity and not self.world.here.shard:  # tensor shards choose alike
            self.record.over_capacity = self.compute.capacity.counted
        timer.collect()
        self.record.kv_bytes, self.record.buffer_bytes = self.compute.kv_nbytes, self.compute.nbytes
        self.record.peak_rss_bytes = memory.peak_rss()
        return self._gather(batcher)

    def _open_rebalancer(self, stage: Stage, waiter: Waiter, clock) -> Rebalancer:
        made = Rebalancer(self.world, self.held, self.compute, self.share, self.model.router.experts, self.job.run, self.record,
                          waiter, clock)
        stage.ready = lambda: made.ready
        return made

    def _pages(self) -> Pages | None:
        return Pages(self.limits.pages, self.limits.page_tokens) if self.limits.pages else None

    def _progress(self) -> Progress:
        quiet = self.comm.rank > 0 or self.job.output.quiet
        return Progress(self.hand_out.total, quiet=quiet)

    def _gather(self, batcher: Batcher | None) -> list[Result]:
        results = []
        for s in batcher.finished if batcher else []:
            index = s.work.index
            scored = self.job.task == "score"
            logprobs = np.concatenate(s.logprobs) if scored else np.array(s.logprobs) if s.work.logprobs else None
            results.append(Result(index, np.array(s.output, dtype=np.int32), logprobs, s.finish))
            self.record.requests.append(RequestTimes(index, len(s.work.tokens), len(s.output), s.admitted_s,
                                                     s.first_token_s, s.end_s))
        if self.job.run.routing_statistics:
            self.pairs = placing.gather_statistics(self.comm, self.compute.pairs, self.model)
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
        self._predict(report)
        path = self._write_outputs(results)
        write_load(job.output.dir, self.records, self.model, self.layout.dp)
        if job.run.routing_statistics:
            write_routing(job.output.dir, self.model, self.pairs)
        if job.output.trace:
            trace.write_trace(job.output.trace, self.records)
        if job.output.show_text:
            show_texts(requests, results, tokenizer)
        report_path = table.write_report(job.output.dir, report)
        if not job.output.quiet:
            print(table.render(report), flush=True)
        for r in failed[:5]:
            self.say(f"{job.requests.file}: line {r.line}: {r.error}")
        if failed:
            self.say(f"{len(failed)} of {len(requests)} requests did not run: their rows in {path} say why")
        self.say(f"outputs in {path}, report in {report_path}" + (f", trace in {job.output.trace}" if job.output.trace else ""))
        return EXIT_OK

    def _predict(self, report: dict) -> None:
        """Adds what the simulator says of this run, where a cluster file is named."""
        found = predicting.predict(self, report)
        if found:
            report["predicted"] = found
            for warning in found["warnings"]:
                self.say(f"warning: {warning}")

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
