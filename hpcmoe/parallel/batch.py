"""Continuous batching on a leader of stage 0: which rows go into each step, and what comes back.

A micro-batch owns a fixed number of slots. At every step finished sequences leave, waiting ones
enter, every sequence in decode gives one row, and prompts fill the rest of the step's rows in
chunks, so that a long prompt delays others by one chunk at most.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from hpcmoe.compute.step import FIELDS, NONE, SAMPLED, SCORED, Batch, Work
from hpcmoe.model.attention import Segments
from hpcmoe.parallel.plan import UNLIMITED, Room
from hpcmoe.parallel.steady import Steady

if TYPE_CHECKING:  # it brings MPI, which a simulation does without
    from hpcmoe.parallel.handout import Supply

AHEAD = 3  # rounds that waiting requests should last: where all rounds are equally long, a question is answered within two


class Pages:
    """The pages of a leader's KV cache that no sequence has; a page holds `tokens` tokens of every layer.

    A sequence takes the pages of its longest possible text when it is admitted, so that none can be
    missing later, and gives them back when it ends.
    """

    def __init__(self, count: int, tokens: int):
        self.tokens = tokens
        self.free = list(range(count - 1, -1, -1))

    def need(self, work: Work) -> int:
        return -(-work.most_tokens // self.tokens)

    def take(self, count: int) -> list[int]:
        return [self.free.pop() for _ in range(count)]


class Sequence:
    """A request in a slot: how far its prompt is done, what was generated."""

    def __init__(self, work: Work, slot: int, now: float):
        self.work, self.slot = work, slot
        self.done = 0  # rows of prompt + output already in the cache
        self.output: list[int] = []
        self.logprobs: list = []
        self.admitted_s, self.first_token_s, self.end_s = now, 0.0, 0.0
        self.finish = ""
        self.pages: list[int] = []

    def next_rows(self, limit: int) -> np.ndarray:
        """Token ids of the next rows: a prompt chunk, or the last sampled token."""
        prompt = self.work.tokens
        if self.done < len(prompt):
            return prompt[self.done:self.done + limit]
        return np.array(self.output[-1:])

    def given_after(self, count: int) -> list[int]:
        """The text's own next token after each of so many next rows; -1 after its last."""
        after = self.work.tokens[self.done + 1:self.done + 1 + count].tolist()
        return after + [-1] * (count - len(after))

    def turns(self, chunk: int, rounds: int) -> int:
        """Requests like this one that its place can take within so many rounds; 0 where it may need all of them itself."""
        rows, outputs = len(self.work.tokens), max(1, self.work.max_tokens)
        steps = max(0, -(-(rows - self.done) // chunk)) + max(1, outputs - len(self.output))
        return 0 if steps > rounds else max(1, rounds // (-(-rows // chunk) + outputs - 1))


class Batcher:
    """Requests of one leader in `micros` micro-batches of `slots` slots each.

    works: its first ones; supply: where more come from, if any may. rows: most rows of a step; chunk: most prompt
    rows of one sequence in a step; score: texts are scored, nothing is generated. clock: seconds since the start
    of the run. pages: where the KV cache is paged, a sequence enters when all of its pages are free.
    """

    def __init__(self, works: list[Work], micros: int, slots: int, rows: int, chunk: int, score: bool, clock=time.monotonic,
                 pages: Pages | None = None, supply: Supply | None = None):
        self.pages, self.supply = pages, supply
        self.score, self.clock = score, clock
        self.rows, self.chunk, self.slots = rows, chunk, slots
        self.waiting = deque(works)
        self.active: list[list[Sequence]] = [[] for _ in range(micros)]
        self.free = [list(range((m + 1) * slots - 1, m * slots - 1, -1)) for m in range(micros)]
        self.sent: list[list[tuple[Sequence, int]]] = [[] for _ in range(micros)]
        self.steady: list[Steady | None] = [None] * micros
        self.finished: list[Sequence] = []
        self.rounds = [0] * micros
        self.begun: list[tuple] = [()] * micros
        self.steps: list[tuple] = []  # (round, micro-batch, start_s, end_s, prefill rows, decode rows)
        self.tokens_out = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(self.active)

    @property
    def alive(self) -> bool:
        """Whether there is work, or may be again."""
        return self.busy or (self.supply is not None and self.supply.open)

    def build(self, micro: int) -> tuple[Batch, np.ndarray]:
        """The next step of a micro-batch and its rows' token ids [t]."""
        if self.supply:
            self.waiting.extend(self.supply.take())
        if self.steady[micro] and not self._may_enter(micro):
            made, prefill, decode = self.steady[micro].build(self.alive), 0, len(self.active[micro])
        else:
            made, prefill, decode = self._build(micro)
        self.begun[micro] = (self.rounds[micro], micro, self.clock(), prefill, decode)
        self.rounds[micro] += 1
        if self.supply and self.supply.may_ask:
            self.supply.ask(self.room())
        return made

    def _may_enter(self, micro: int) -> bool:
        return bool(self.waiting and self.free[micro]) and self._has_pages(self.waiting[0])

    def _build(self, micro: int) -> tuple[tuple[Batch, np.ndarray], int, int]:
        """A step in which sequences may enter: (step and tokens, prefill rows, decode rows)."""
        self._settle(micro)
        self.steady[micro] = None
        while self._may_enter(micro):
            sequence = Sequence(self.waiting.popleft(), self.free[micro].pop(), self.clock())
            if self.pages:
                sequence.pages = self.pages.take(self.pages.need(sequence.work))
            self.active[micro].append(sequence)
        sequences = self.active[micro]
        decoding = [s for s in sequences if s.done >= len(s.work.tokens)]
        left, parts, prefill = self.rows - len(decoding), [(s, s.next_rows(1)) for s in decoding], 0
        for s in sequences:
            if s.done < len(s.work.tokens) and left > 0:
                tokens = s.next_rows(min(left, self.chunk))
                parts.append((s, tokens))
                left -= len(tokens)
                prefill += len(tokens)
        parts.sort(key=lambda part: part[0].slot)
        table = np.array([(s.slot, s.done, len(tokens), self._emit(s, len(tokens)), s.work.index,
                           0 if s.done else len(s.pages)) for s, tokens in parts], dtype=np.int64).reshape(-1, FIELDS)
        slot_q, start_q, count_q, emit_q, request_q, n_page_q = table.T
        page_n = np.array([page for s, _ in parts if not s.done for page in s.pages], dtype=np.int64)
        next_t = np.array([t for s, tokens in parts for t in s.given_after(len(tokens))] if self.score else [], dtype=np.int64)
        self.sent[micro] = [(s, int(emit)) for (s, _), emit in zip(parts, emit_q)]
        for s, tokens in parts:
            s.done += len(tokens)
        token_t = np.concatenate([tokens for _, tokens in parts]) if parts else np.zeros(0, dtype=np.int64)
        segments = Segments.of(slot_q, start_q, count_q)
        if decoding and len(decoding) == len(sequences) and not self.score:
            self.steady[micro] = Steady([s for s, _ in parts])
        return (Batch(self.alive, prefill, segments, emit_q, request_q, n_page_q, page_n, next_t), token_t), prefill, len(decoding)

    def _settle(self, micro: int) -> None:
        if self.steady[micro]:
            self.steady[micro].settle()

    def room(self) -> Room:
        """What the places that are free, or will be within AHEAD rounds, can take beside the requests in waiting."""
        for m in range(len(self.active)):
            self._settle(m)
        turns = [(s, s.turns(self.chunk, AHEAD)) for sequences in self.active for s in sequences]
        places = sum(map(len, self.free)) + sum(n for _, n in turns) - len(self.waiting)
        if self.pages is None:
            return Room(places, UNLIMITED)
        pages = len(self.pages.free) + sum(n * len(s.pages) for s, n in turns) - sum(map(self.pages.need, self.waiting))
        return Room(places, pages * self.pages.tokens)

    def _has_pages(self, work: Work) -> bool:
        return self.pages is None or self.pages.need(work) <= len(self.pages.free)

    def _emit(self, s: Sequence, count: int) -> int:
        if self.score:
            return SCORED
        return SAMPLED if s.done + count >= len(s.work.tokens) else NONE

    def accept(self, micro: int, token_q: np.ndarray, logprob_n: np.ndarray) -> None:
        """Takes what the last stage made of the step sent before.

        token_q: one token per sampled segment, in order; logprob_n: one value per sampled
        segment, or per row that has a next token where texts are scored.
        """
        now = self.clock()
        if self.steady[micro]:
            self.tokens_out += len(token_q)
            if self.steady[micro].take(token_q, logprob_n):
                self._settle(micro)
                self.steady[micro] = None
        elif self.score:
            values = iter(np.split(logprob_n, self._splits(micro)))
            for s, _ in self.sent[micro]:
                s.logprobs.append(next(values))
                if s.done >= len(s.work.tokens):
                    s.finish, s.first_token_s = "score", now
        else:
            tokens, values = iter(token_q.tolist()), iter(logprob_n.tolist())
            for s, emit in self.sent[micro]:
                if emit == SAMPLED:
                    self._take(s, next(tokens), next(values), now)
        self.sent[micro] = []
        number, _, start, prefill, decode = self.begun[micro]
        if prefill + decode:
            self.steps.append((number, micro, start, now, prefill, decode))
        if self.steady[micro]:
            return
        ended = [s for s in self.active[micro] if s.finish]
        self.active[micro] = [s for s in self.active[micro] if not s.finish]
        for s in ended:
            s.end_s = now
            self.free[micro].append(s.slot)
            if self.pages:
                self.pages.free += s.pages
            self.finished.append(s)

    def _splits(self, micro: int) -> np.ndarray:
        """Where each emitting segment's log-probabilities end."""
        sizes = [self._scored(s) for s, _ in self.sent[micro]]
        return np.cumsum(sizes)[:-1].astype(int) if sizes else np.zeros(0, dtype=int)

    def _scored(self, s: Sequence) -> int:
        """Rows of the last step of a scored text that have a next token (the text's last has none)."""
        before = sum(len(values) for values in s.logprobs)
        return min(s.done, len(s.work.tokens) - 1) - before

    def _take(self, s: Sequence, token: int, logprob: float, now: float) -> None:
        if not s.output:
            s.first_token_s = now
        s.output.append(token)
        s.logprobs.append(logprob)
        self.tokens_out += 1
        if token in s.work.stop_ids:
            s.finish = "stop"
        elif len(s.output) >= s.work.max_tokens:
            s.finish = "length"
