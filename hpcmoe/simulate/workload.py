"""Which rows each step has: the engine's own Batcher, run without a model. Times come later, from the clock.

What a step holds depends on requests alone, not on how long steps take: every leader has all of its requests from the start, or replicas that
take them from one list go at the same pace. So the
steps of a leader are made before anything is timed, and leaders with equally long requests have them made once. The clock that the
Batcher asks is the number of the step that is about to begin.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcmoe.compute.base import Sizes
from hpcmoe.compute.step import SAMPLED, Batch, Work
from hpcmoe.model.attention import DECODE_BLOCK
from hpcmoe.parallel.batch import Batcher, Pages
from hpcmoe.parallel.plan import Room
from hpcmoe.parallel.requestlist import RequestList


class Rows(NamedTuple):
    """One step of one micro-batch on one leader. start_q, count_q: its chunks of prompts; keys: tokens in the caches of its decode rows
    and the rows themselves, altogether; singles: rows that look at their cache alone (decode, and chunks of one row); wanted: rows
    whose next token is sampled; prefill, decode: as the report counts rows. padded: as keys, with every row of a block as many as the
    one with most (a CPU's attention, model/attention.py); apart: of these, keys in blocks whose slots are no neighbours, which it copies."""

    start_q: np.ndarray
    count_q: np.ndarray
    keys: float
    singles: int
    wanted: int
    prefill: int
    decode: int
    padded: float = 0.0
    apart: float = 0.0

    @property
    def count(self) -> int:
        return self.prefill + self.decode


class Served(NamedTuple):
    """One request: its place among its leader's, the steps in which it was admitted, and after which its first and its last
    token were there: numbers of steps, round * micro-batches + micro-batch, that begin with these tokens known."""

    place: int
    prompt: int
    outputs: int
    admitted: int
    first: int
    end: int


class Feed(NamedTuple):
    """All steps of one leader: rows_rm by round and micro-batch, and what became of its requests."""

    rows_rm: list[list[Rows]]
    served: list[Served]


class _Leader:
    """A leader's Batcher, without a model; supply: where more requests come from, if any may."""

    def __init__(self, works: list[Work], sizes: Sizes, chunk: int, window: int, supply: _Supply | None = None):
        pages = Pages(sizes.pages, sizes.page_tokens) if sizes.pages else None
        self.at, self.micros, self.window, self.rows_rm, self.supply = 0, sizes.micros, window, [], supply
        self.batcher = Batcher(works, sizes.micros, sizes.slots, sizes.rows, chunk, False, lambda: self.at, pages, supply)

    def round(self) -> bool:
        """Makes the steps of the next round; whether there is work, as leaders tell each other in the first exchange of a round."""
        rows_m, alive = [], False
        for m in range(self.micros):
            self.at = len(self.rows_rm) * self.micros + m
            if self.rows_rm:
                sampled = self.rows_rm[-1][m].wanted
                self.batcher.accept(m, np.zeros(sampled, np.int64), np.zeros(sampled))
            batch, _ = self.batcher.build(m)
            alive = batch.alive if m == 0 else alive
            rows_m.append(rows_of(batch, self.window))
        self.rows_rm.append(rows_m)
        return alive

    def feed(self, index: list[int]) -> Feed:
        """What was done; index: of its requests, in the order of their places."""
        place = {number: i for i, number in enumerate(index)}
        return Feed(self.rows_rm, [Served(place[s.work.index], len(s.work.tokens), len(s.output), s.admitted_s, s.first_token_s, s.end_s)
                                   for s in self.batcher.finished])


def feed(lengths: list[tuple[int, int]], sizes: Sizes, chunk: int, window: int) -> Feed:
    """The steps of a leader with requests of these (prompt, output) lengths, all of them from the start.

    sizes: of the run (plan.limits); window: of the attention, 0 for none. All outputs have their full length.
    """
    leader = _Leader(works_of(lengths), sizes, chunk, window)
    while leader.round():
        pass
    return leader.feed(list(range(len(lengths))))


class _Supply:
    """A leader's questions for more requests (parallel/handout.py), answered after the round in which they are asked."""

    def __init__(self, todo: RequestList):
        self.todo, self.open, self.room, self.came = todo, bool(todo.left), None, []
        self.got: list[Work] = []

    def take(self) -> list[Work]:
        came, self.came = self.came, []
        return came

    @property
    def may_ask(self) -> bool:
        return self.open and self.room is None

    def ask(self, room: Room) -> None:
        self.room = room if min(room) > 0 else None

    def answer(self) -> None:
        """What rank 0 does between its rounds."""
        if self.room is not None:
            self.came, self.room = self.todo.share(self.room), None
            self.got += self.came
            self.open = bool(self.todo.left)


def handed_out(lengths: list[tuple[int, int]], leaders_of: list[int], sizes: Sizes, chunk: int, window: int) -> tuple[list[list[Feed]], list[list[list[int]]]]:
    """(feeds, numbers of requests), by replica and leader, where several replicas take from one list and go at the same pace.

    leaders_of: each replica's number of leaders.
    """
    todo = RequestList(works_of(lengths), sum(leaders_of))
    shares, replicas = iter(todo.start(Room.of(sizes))), []
    for count in leaders_of:
        replicas.append([])
        for _ in range(count):
            mine, supply = next(shares), _Supply(todo)
            supply.got += mine
            replicas[-1].append(_Leader(mine, sizes, chunk, window, supply))
    going = replicas
    while going:
        going = [leaders for leaders in going if any([leader.round() for leader in leaders])]
        for leader in (leader for leaders in replicas for leader in leaders):
            leader.supply.answer()
    index_dj = [[[w.index for w in leader.supply.got] for leader in leaders] for leaders in replicas]
    return [[leader.feed(index) for leader, index in zip(leaders, index_j)] for leaders, index_j in zip(replicas, index_dj)], index_dj


def works_of(lengths: list[tuple[int, int]]) -> list[Work]:
    """Requests of these (prompt, output) lengths."""
    return [Work(i, np.zeros(prompt, np.int8), outputs, 0.0, 0, 1.0, 0, (), False) for i, (prompt, outputs) in enumerate(lengths)]


def even_rounds(feeds: list[Feed]) -> list[Feed]:
    """The feeds of a replica's leaders with empty steps at the end, so that all have as many rounds: leaders go on while any has work."""
    none = Rows(np.zeros(0, int), np.zeros(0, int), 0.0, 0, 0, 0, 0)
    most, made = max(len(feed.rows_rm) for feed in feeds), {}
    for feed in feeds:
        if id(feed) not in made:
            made[id(feed)] = feed._replace(rows_rm=feed.rows_rm + [[none] * len(feed.rows_rm[0])] * (most - len(feed.rows_rm)))
    return [made[id(feed)] for feed in feeds]


def rows_of(batch: Batch, window: int) -> Rows:
    """What a step holds; window: of the attention, 0 for none."""
    start_q, count_q = batch.segments.start_q, batch.segments.count_q
    one_q = count_q == 1
    keys_q = start_q[one_q] + 1
    if window:
        keys_q = np.minimum(keys_q, window)
        start_q = np.minimum(start_q, np.maximum(window - count_q, 0))
    padded, apart = blocks(batch.segments.slot_q[one_q], batch.segments.start_q[one_q] + 1)
    return Rows(start_q[~one_q], count_q[~one_q], float(keys_q.sum()), int(one_q.sum()), int((batch.emit_q == SAMPLED).sum()),
                batch.prefill_rows, batch.rows - batch.prefill_rows, padded, apart)


def blocks(slot_b: np.ndarray, keys_b: np.ndarray) -> tuple[float, float]:
    """(padded, apart) of single rows in these slots that look at so many keys."""
    order, padded, apart = np.argsort(slot_b, kind="stable"), 0.0, 0.0
    for block in np.array_split(order, max(1, -(-len(order) // DECODE_BLOCK))):
        if len(block):
            keys = float(len(block) * keys_b[block].max())
            padded += keys
            apart += keys * (slot_b[block[-1]] - slot_b[block[0]] + 1 != len(block))
    return padded, apart
