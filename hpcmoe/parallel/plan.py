"""Decisions before a run: which leader takes which requests, how many fit, how work is cut."""

from __future__ import annotations

import heapq
from typing import NamedTuple

from hpcmoe.config import ModelConfig, RunJob
from hpcmoe.errors import UserError, at
from hpcmoe.model.kvcache import bytes_per_sequence
from hpcmoe.parallel.batch import Work
from hpcmoe.parallel.layout import Layout
from hpcmoe.parallel.stage import Limits

KV_SHARE = 0.9  # of the free memory


def hand_out(works: list[Work], bins: int) -> list[list[Work]]:
    """Requests dealt to `bins` leaders: longest first, each to the one with the fewest tokens so far.

    Every leader keeps the input's order. (Longest processing time first, Graham 1969.)
    """
    def tokens(work: Work) -> int:
        return len(work.tokens) + work.max_tokens

    load = [(0, b) for b in range(bins)]
    dealt: list[list[Work]] = [[] for _ in range(bins)]
    for work in sorted(works, key=lambda w: (-tokens(w), w.index)):
        total, b = heapq.heappop(load)
        dealt[b].append(work)
        heapq.heappush(load, (total + tokens(work), b))
    return [sorted(part, key=lambda w: w.index) for part in dealt]


class Cut(NamedTuple):
    """Micro-batches and lanes of a run."""

    micros: int
    lanes: int


def cut(run: RunJob, layout: Layout, on_gpu: bool) -> Cut:
    """How many micro-batches and lanes where the job leaves it open.

    Two lanes where a GPU computes while messages travel. On a CPU messages move while the
    rank is inside MPI, and halves of a batch read the same weights twice: one lane.
    """
    lanes = 1 if run.schedule == "plain" else run.lanes or (2 if on_gpu and layout.stage_size > 1 else 1)
    micros = run.micro_batches or layout.pp * lanes
    return Cut(micros, min(lanes, micros))


def limits(run: RunJob, layout: Layout, leaders: int, most: int, cut: Cut, context: int) -> Limits:
    """Slots and rows of one micro-batch on one leader. most: requests of the leader that has most.

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
    return Limits(cut.micros, cut.lanes, slots, rows, context)


def fit_slots(model: ModelConfig, layers: int, wanted: Limits, run: RunJob, free: int, leaders: int, where: str) -> int:
    """Slots per micro-batch whose KV cache fits `free` bytes on this leader, at most the wanted ones.

    Raises UserError, saying how many sequences fit, where run.max_sequences asks for more or none fits.
    """
    a = model.attention
    one = bytes_per_sequence(layers, a.kv_heads, a.head_dim, wanted.context)
    free = int(run.memory_gb * 2**30) if run.memory_gb else int(free * KV_SHARE)
    fitting = free // (one * wanted.micros)
    if fitting >= wanted.slots:
        return wanted.slots
    if run.max_sequences or fitting < 1:
        raise UserError(
            f"job: KV cache: {wanted.slots * wanted.micros} sequences of {wanted.context} tokens need "
            f"{one * wanted.slots * wanted.micros / 2**30:.3g} GiB on {where}, {free / 2**30:.3g} GiB are free: "
            f"{free // one * leaders} sequences fit in a replica: lower run.max_sequences = {run.max_sequences} "
            f"or run.context = {run.context}, or raise run.memory_gb")
    return fitting
