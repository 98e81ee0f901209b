"""What the search tries: layouts, leaders, spare slots, batches, micro-batches in flight, lanes and transport, as far as the engine takes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Iterator, NamedTuple

import numpy as np

from hpcmoe.config import JobConfig, LayoutJob
from hpcmoe.errors import UserError
from hpcmoe.parallel.layout import Layout, check_tp, choose
from hpcmoe.simulate.run import Told

STEP_ROWS = (1024, 8192)  # rows of a step where the job does not say: at least; prompts are read so many at a time
MOST_ROWS = 1 << 15       # of a step


class Shape(NamedTuple):
    """What one micro-batch goes through. leaders: of a stage; hierarchical: the transport, else rows go straight to their experts;
    sequences: of a leader in a micro-batch; rows: most of a leader's step."""

    layout: Layout
    leaders: int
    hierarchical: bool
    sequences: int
    rows: int


class Candidate(NamedTuple):
    """A shape, and how many such micro-batches are in flight in a replica, and interleaved on a stage."""

    shape: Shape
    micros: int
    lanes: int

    @property
    def sequences(self) -> int:
        """At once, in all replicas."""
        s = self.shape
        return s.sequences * s.leaders * self.micros * s.layout.dp

    @property
    def name(self) -> str:
        """Unlike any other's; sorts ties."""
        s, layout = self.shape, self.shape.layout
        return (f"{layout} leaders={layout.leaders} replicas={layout.replicas} {'hierarchical' if s.hierarchical else 'flat'} "
                f"sequences={s.sequences:05d} rows={s.rows:05d} micros={self.micros:04d} lanes={self.lanes}")


def job_of(told: Told, c: Candidate) -> JobConfig:
    """The job of a candidate: the one that was told, with all that was searched filled in."""
    layout, shape, (prompt, outputs) = c.shape.layout, c.shape, told.lengths[0]
    told_so = told.job.run.transport  # auto would be whichever of the two is quicker
    transport = "hierarchical" if shape.hierarchical else "ialltoallv" if told_so == "auto" else told_so
    run = replace(told.job.run, micro_batches=c.micros, lanes=c.lanes, batch_tokens=shape.rows * shape.leaders,
                  max_sequences=shape.sequences * shape.leaders * c.micros, transport=transport)
    seats = replace(told.job.layout, **{name: getattr(layout, name) for name in ("dp", "pp", "ep", "tp", "leaders", "replicas")})
    batch = replace(told.job.throughput, sequences=c.sequences, prompt_tokens=prompt, output_tokens=outputs)
    return replace(told.job, task="throughput", layout=seats, run=run, throughput=batch)


class Choices:
    """All candidates. fixed: keys of the job that the user has set: they are not searched. layouts: that the engine takes; refused: how
    many it does not, by why."""

    def __init__(self, told: Told, fixed: set[str]):
        self.told, self.fixed, self.refused = told, fixed, Counter()
        self.node_r = np.arange(told.gpus) // told.cluster.nodes.ranks_per_node
        self.layouts = list(self._layouts())

    def _takes(self, key: str, value) -> bool:
        """Whether a value is to be tried."""
        section, name = key.split(".")
        return key not in self.fixed or getattr(getattr(self.told.job, section), name) == value

    # ------------------------------------------------------------ layouts
    def _layouts(self) -> Iterator[Layout]:
        gpus, model = self.told.gpus, self.told.model
        for tp in _divisors(gpus):
            for ep in _divisors(gpus // tp):
                for pp in _divisors(gpus // tp // ep):
                    numbers = {"dp": gpus // (tp * ep * pp), "pp": pp, "ep": ep, "tp": tp}
                    if not all(self._takes(f"layout.{name}", n) for name, n in numbers.items()):
                        continue
                    why = self._refusal(pp, tp)
                    if why:
                        self.refused[why] += 1
                        continue
                    for job in self._seats(numbers):
                        try:
                            yield choose(job, gpus, model)[0]
                        except UserError as error:
                            self.refused[str(error).split(": expected")[0]] += 1

    def _refusal(self, pp: int, tp: int) -> str:
        try:
            check_tp(self.told.model, tp)
        except UserError as error:
            return str(error).split(":")[-1].strip() if "norms" in str(error) else f"tp: not a divisor of the experts' width {self.told.model.expert.f}"
        return f"pp: more than {self.told.model.layers} layers" if pp > self.told.model.layers else ""

    def _seats(self, numbers: dict) -> Iterator[LayoutJob]:
        """Leaders that are different ones, and spare slots where they can help."""
        ep, seen = numbers["ep"], set()
        leaders = [self.told.job.layout.leaders] if "layout.leaders" in self.fixed else \
            ["all", "node"] + [str(n) for n in _powers(1, ep - 1)]
        for name in leaders:
            places = tuple(map(tuple, Layout(**numbers, leaders=name).leader_places(self.node_r, 0))) if not name.isdecimal() or int(name) <= ep else name
            if places not in seen:
                seen.add(places)
                for replicas in self._spares(ep):
                    yield LayoutJob(**numbers, leaders=name, replicas=replicas)

    def _spares(self, ep: int) -> list[int]:
        """Copies cost memory and rows: only a load that is uneven, or places without an expert, ask for them."""
        experts = self.told.model.router.experts
        if "layout.replicas" in self.fixed:
            return [self.told.job.layout.replicas]
        least = max(0, ep - experts)
        more = ep * (-(-experts // ep) + 1) - experts
        return [least] if ep == 1 or np.ptp(self.told.share_le) < 1e-12 else sorted({least, more})

    # ------------------------------------------------------------ batches
    def shapes(self, layout: Layout) -> Iterator[Shape]:
        """By transport, sequences, and rows of a step."""
        leaders = len(layout.leader_places(self.node_r, 0)[0])
        for hierarchical in self._transports(layout):
            for sequences in _powers(1, min(MOST_ROWS, len(self.told.lengths)) // leaders):
                for rows in self._steps(sequences * leaders):
                    yield Shape(layout, leaders, hierarchical, sequences, max(1, rows // leaders))

    def _steps(self, needed: int) -> list[int]:
        """Rows of a step, at least those that are needed in decode; more than the least only where prompts can fill them."""
        if "run.batch_tokens" in self.fixed:
            return [self.told.job.run.batch_tokens] if needed <= self.told.job.run.batch_tokens else []
        least, *more = STEP_ROWS
        return sorted({max(needed, rows) for rows in (least, *(more if needed * self.told.lengths[0][0] > least else ()))})

    def _transports(self, layout: Layout) -> list[bool]:
        """Through forwarders only where a stage lies on several nodes, and one of them has several of its places."""
        if "run.transport" in self.fixed:
            return [self.told.job.run.transport == "hierarchical"]
        node_r = self.node_r[list(layout.column(0, 0))]
        nodes = len(set(node_r.tolist()))
        return [False, True] if 1 < nodes < len(node_r) else [False]

    def cuts(self, layout: Layout) -> list[tuple[int, int]]:
        """(micro-batches, lanes): in flight, from one to what fills all lanes of all stages and more."""
        run, pp = self.told.job.run, layout.pp
        lanes = [1] if run.schedule == "plain" else [run.lanes] if run.lanes else [1, 2] if layout.stage_size > 1 else [1]
        most = max(2 * pp, min(4 * pp, 16))
        micros = [run.micro_batches] if run.micro_batches else sorted({*_powers(1, most), pp, 2 * pp})
        return [(m, k) for m in micros for k in lanes if k <= m]

    def takes_batch(self, c: Candidate) -> bool:
        """Whether no more requests are at once than there are, and as many as the job asks for, if it does."""
        return c.sequences <= len(self.told.lengths) and self._takes("run.max_sequences", c.sequences // c.shape.layout.dp)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _powers(low: int, high: int) -> list[int]:
    """Of two, from low to high."""
    found = []
    while low <= high:
        found.append(low)
        low *= 2
    return found
