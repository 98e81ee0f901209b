"""hpcmoe, as the benchmark drives it: one of these on each rank, started by mpiexec.

Every rank has a connection of its own to the benchmark and waits there, in a blocking read, whenever
it has nothing to measure: a rank that waited inside MPI would take the core that the other program needs.
"""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import Client

import numpy as np

from hpcmoe import job as jobs
from hpcmoe import launch, linear
from hpcmoe.config import JobConfig, OutputJob, RunJob, ThroughputJob, WeightsJob
from hpcmoe.data.weights import WeightsFile
from hpcmoe.prepare import prepare
from hpcmoe.report.metrics import MOE
from workloads import SEED, Workload


class Rank:
    """One rank. Methods without underscore are what the benchmark can ask for; all ranks are asked at once,
    except for `peak`."""

    def __init__(self, comm, line, weights: str, context: int):
        self.comm, self.line, self.weights, self.context = comm, line, weights, context
        self.held = None

    # ------------------------------------------------------------ the machine
    def peak(self, dtype: str, seconds: float) -> dict:
        """This process's best GFLOP/s at 512 rows by library, and its best GB/s of reading memory."""
        rates = {"onednn": linear.peak(linear.choose("onednn", dtype), seconds=seconds)}
        if dtype == "fp32":
            rates["numpy"] = linear.peak(linear.choose("numpy"), seconds=seconds)
        return {"gflops": rates, "read_gb_s": _read_rate(seconds)}

    # ------------------------------------------------------------ a workload
    def start(self, w: Workload, repetitions: int, dtype: str) -> dict:
        """Runs prompts and warm-up, then `repetitions` times: waits for a word, runs w.steps rounds, tells."""
        session = self._session(w, repetitions, dtype)
        if self.held is None:
            session.load()
            self.held, self.backend, self.limits = session.held, session.backend, session.limits
        else:  # loaded before: only the sizes of the run are new
            session.held, session.backend = self.held, self.backend
            session.limits = session._limits()
        timer = Timer(self, session, w, repetitions)
        head = session.held.head
        session.held.head = timer.watch(head)
        session.failure_point = timer.round_starts
        try:
            session.execute(time.monotonic())
        finally:
            session.held.head = head
        load_le = session.record.load[w.rounds_before:w.rounds_before + repetitions * w.steps]
        return {"load": load_le, "experts": session.record.experts}

    def forget(self) -> None:
        """Lets go of the weights, for the next data type."""
        self.held = None

    def _session(self, w: Workload, repetitions: int, dtype: str) -> jobs.Session:
        """The job of a workload, as `hpcmoe run` would make it."""
        sequences, output = w.sequences, 1 + w.warm + repetitions * w.steps + 1
        if w.prefill:  # every step takes the next set of prompts
            sequences, output = w.sequences * output, 1
        config = JobConfig(
            "throughput", WeightsJob(self.weights, dtype), output=OutputJob(quiet=True),
            run=RunJob(batch_tokens=w.sequences * w.prompt, prefill_chunk=w.prompt, max_sequences=w.sequences,
                       context=self.context, stall_s=3600.0),
            throughput=ThroughputJob(sequences, w.prompt, output, SEED))
        mine = prepare(config, self.comm.size) if self.comm.rank == 0 else None
        shared = self.comm.bcast(mine.public() if mine else None)
        return jobs.Session(self.comm, shared, mine, lambda step: None, lambda text: None)

    # ------------------------------------------------------------ bare products
    def bare(self, load_rle, dtype: str) -> float:
        """GFLOP/s of nothing but an expert's three products, over the row counts [round, layer, expert] of a run.

        Several experts' weights take turns, so that weights come from memory as in the run.
        """
        backend = linear.choose("onednn", dtype)
        with WeightsFile(self.weights) as file:
            model = file.config
            experts = [{name: backend.linear(weight) for name, weight in file.expert(0, e).items()} for e in range(4)]
        most = int(load_rle.max())
        x, h, y = (np.ones((most, width), np.float32) for width in (model.d, model.expert.f, model.d))
        best = np.inf
        for _ in range(3):
            self.comm.Barrier()
            start = time.perf_counter()
            for i, n in enumerate(int(n) for n in load_rle.reshape(-1)):
                if n:
                    expert = experts[i % len(experts)]
                    expert["gate"](x[:n], out=h[:n])
                    expert["up"](x[:n], out=h[:n])
                    expert["down"](h[:n], out=y[:n])
            best = min(best, time.perf_counter() - start)
        return 6e-9 * model.d * model.expert.f * float(load_rle.sum()) / best


class Timer:
    """Called at the start of every round: where a repetition starts or ends, it talks to the benchmark."""

    def __init__(self, rank: Rank, session, w: Workload, repetitions: int):
        self.rank, self.session, self.w, self.repetitions = rank, session, w, repetitions
        self.logits, self.seen, self.since = [], [], None

    def watch(self, head):
        def watched(x_nd):
            logit_nv = head(x_nd)
            if self.since is None:
                self.seen.append(logit_nv)
            return logit_nv
        return watched

    def round_starts(self, number: int) -> None:
        if self.since is None and self.seen:
            self.logits.append(np.concatenate(self.seen))
            self.seen = []
        timed = number - self.w.rounds_before
        if timed < 0 or timed % self.w.steps or timed > self.repetitions * self.w.steps:
            return
        if timed:
            self._tell()
        else:
            self._ready()
        self.rank.line.recv()  # after the last turn too: the rounds that are left would disturb the other's
        self.rank.comm.Barrier()
        self.since = self._now()

    def _ready(self) -> None:
        """Which requests are this rank's, and their logits: after the prompt and after each step up to here."""
        rounds = self.logits[:1] if self.w.prefill else self.logits
        index = [work.index for work in self.session.works[:len(rounds[0])]] if rounds else []
        self.rank.line.send({"index": index, "logits": rounds, "load_s": self.session.record.load_s})
        self.logits = []

    def _now(self) -> tuple:
        record = self.session.record
        return (time.perf_counter(), sum(record.busy_s.get(k, 0.0) + record.wait_s.get(k, 0.0) for k in MOE),
                record.busy_s.get("EXPERT", 0.0), record.expert_flop, dict(record.busy_s), dict(record.wait_s))

    def _tell(self) -> None:
        before, now = self.since, self._now()
        self.rank.line.send({
            "seconds": now[0] - before[0], "moe_s": now[1] - before[1], "expert_s": now[2] - before[2],
            "expert_flop": now[3] - before[3],
            "busy_s": {k: v - before[4].get(k, 0.0) for k, v in now[4].items()},
            "wait_s": {k: v - before[5].get(k, 0.0) for k, v in now[5].items()}})


def _read_rate(seconds: float, nbytes: int = 1 << 28) -> float:
    """GB/s of the best of two ways to read an array that no cache holds."""
    values = np.full(nbytes // 4, 1.0, np.float32)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for read in (lambda: np.dot(values, values), values.max):
            start = time.perf_counter()
            read()
            best = max(best, nbytes / (time.perf_counter() - start))
    return best / 1e9


def main() -> int:
    address, weights, context = sys.argv[1], sys.argv[2], int(sys.argv[3])
    comm = launch.start_mpi().COMM_WORLD
    line = Client(address, family="AF_UNIX")
    line.send(comm.rank)
    rank = Rank(comm, line, weights, context)
    while True:
        name, *args = line.recv()
        if name == "end":
            return 0
        line.send(getattr(rank, name)(*args))


if __name__ == "__main__":
    main()
