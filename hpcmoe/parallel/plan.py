"""Decisions before a run: which leader takes which requests, how many fit, how work is cut."""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

from hpcmoe.compute.base import Sizes
from hpcmoe.compute.step import Work
from hpcmoe.config import ModelConfig, RunJob
from hpcmoe.errors import at
from hpcmoe.parallel.layout import Layout

UNLIMITED = 2**62
STAGED_BYTES = 4 << 20  # that `staged` copies at once: what travels while the next ones are copied
TRIAL_BYTES = 1 << 20  # of a leader's rows in a trial of exchanges: well below a second altogether where a link gives 100 MB/s
TRIAL_MARGIN = 0.9     # hierarchical has to be clearly quicker: its further hops cost more where ranks compute


class Room(NamedTuple):
    """What a leader has places for: sequences, and tokens of the KV cache (UNLIMITED where a page is a slot)."""

    sequences: int
    tokens: int

    @classmethod
    def of(cls, sizes: Sizes) -> "Room":
        """Of a leader without sequences."""
        return cls(sizes.slots * sizes.micros, sizes.pages * sizes.page_tokens or UNLIMITED)


def hand_out(works: list[Work], bins: int) -> list[list[Work]]:
    """Requests dealt to `bins` leaders: longest first, each to the one with the fewest tokens so far.

    Every leader keeps the input's order. (Longest processing time first, Graham 1969.)
    """
    load = [(0, b) for b in range(bins)]
    dealt: list[list[Work]] = [[] for _ in range(bins)]
    for work in sorted(works, key=lambda w: (-w.most_tokens, w.index)):
        total, b = heapq.heappop(load)
        dealt[b].append(work)
        heapq.heappush(load, (total + work.most_tokens, b))
    return [sorted(part, key=lambda w: w.index) for part in dealt]


class Cut(NamedTuple):
    """Micro-batches and lanes of a run."""

    micros: int
    lanes: int


def cut(run: RunJob, layout: Layout, on_gpu: bool) -> Cut:
    """How many micro-batches and lanes where the job leaves it open, and nothing is measured (see lanes.py).

    Two lanes where a GPU computes while messages travel. On CPUs of one node messages move while a
    rank is inside MPI, and halves of a batch read the same weights twice: one lane.
    """
    lanes = 1 if run.schedule == "plain" else run.lanes or (2 if on_gpu and layout.stage_size > 1 else 1)
    micros = run.micro_batches or layout.pp * lanes
    return Cut(micros, min(lanes, micros))


def schedule_name(run: RunJob, on_gpu: bool) -> str:
    """The schedule that is built: a GPU is given a queue of work, a CPU does it."""
    return "queued" if run.schedule == "overlapped" and on_gpu else run.schedule


def limits(run: RunJob, model: ModelConfig, layout: Layout, leaders: int, most: int, cut: Cut, context: int) -> Sizes:
    """Slots and rows of one micro-batch on one leader. most: requests of a leader, were all dealt at once.

    The pages of the KV cache are left open (0).

    Raises UserError where the numbers contradict each other.
    """
    rows = max(1, run.batch_tokens // leaders)
    if run.max_sequences:
        slots = -(-run.max_sequences // (leaders * cut.micros))
        if slots > rows:
            raise at("job", "run.max_sequences", run.max_sequences,
                     f"at most {rows * leaders * cut.micros}: run.batch_tokens = {run.batch_tokens} rows "
                     f"x {cut.micros} micro-batch(es), since each sequence in decode takes a row of every step")
    else:
        slots = min(rows, max(1, -(-most // cut.micros)))
    chosen = min(model.router.top_k, -(-layout.slots(model.router.experts) // layout.ep))  # of one token on one rank, at most
    return Sizes(cut.micros, cut.lanes, slots, rows, context, 0, 0, rows * leaders * chosen)


def usual_rows(run: RunJob, task: str, leaders: int, most: int, cut: Cut) -> int:
    """Rows of a leader in most steps: one per sequence in decode; where texts are scored, as many as a step takes.

    most: as for limits().
    """
    rows = max(1, run.batch_tokens // leaders)
    sequences = run.max_sequences / leaders if run.max_sequences else most
    return rows if task == "score" else max(1, min(rows, math.ceil(sequences / cut.micros)))


def trial_rows(rows: int, width: int, top_k: int) -> int:
    """Rows of a leader in a trial of exchanges, of `rows` in most steps; width: bytes of one in dispatch."""
    return max(1, min(rows, TRIAL_BYTES // (width * top_k)))


def nodes_matter(layout: Layout, node_of_rank) -> bool:
    """Whether any stage has several nodes, and several ranks on one of them: only then a trial of exchanges is made."""
    stages = [[node_of_rank[r] for r in layout.column(dp, p)] for dp in range(layout.dp) for p in range(layout.pp)]
    return any(1 < len(set(nodes)) < len(nodes) for nodes in stages)
