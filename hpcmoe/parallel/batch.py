"""Continuous batching on a leader of stage 0: which rows go into each step, and what comes back.

A micro-batch owns a fixed number of slots. At every step finished sequences leave, waiting ones
enter, every sequence in decode gives one row, and prompts fill the rest of the step's rows in
chunks, so that a long prompt delays others by one chunk at most.
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import numpy as np

from hpcmoe.model.attention import Segments

HEAD = 4  # alive, segments, rows, prefill rows
FIELDS = 5  # per segment: slot, start, count, emit, request
NONE, SAMPLED, SCORED = 0, 1, 2  # emit: nothing, the token after the last row, every row's next token


class Batch(NamedTuple):
    """One step of one micro-batch on one leader, as it travels from stage to stage.

    alive: the leader still has work. request_q: the sequence's number among the leader's requests.
    """

    alive: bool
    prefill_rows: int
    segments: Segments
    emit_q: np.ndarray
    request_q: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.segments.slot_t)

    def header(self) -> np.ndarray:
        s = self.segments
        body = np.stack([s.slot_q, s.start_q, s.count_q, self.emit_q, self.request_q], axis=1)
        return np.concatenate([[self.alive, len(s.slot_q), self.rows, self.prefill_rows], body.reshape(-1)]).astype(np.int64)

    @classmethod
    def of(cls, header: np.ndarray) -> "Batch":
        alive, segments, _, prefill = header[:HEAD]
        slot_q, start_q, count_q, emit_q, request_q = header[HEAD:HEAD + FIELDS * segments].reshape(-1, FIELDS).T
        return cls(bool(alive), int(prefill), Segments.of(slot_q, start_q, count_q), emit_q, request_q)


def header_size(rows: int) -> int:
    """Numbers in the header of a step of at most `rows` rows."""
    return HEAD + FIELDS * rows


class Work(NamedTuple):
    """What a leader needs to know of one request; index is its place in the input."""

    index: int
    tokens: np.ndarray
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop_ids: tuple[int, ...]
    logprobs: bool


class Sequence:
    """A request in a slot: how far its prompt is done, what was generated."""

    def __init__(self, number: int, work: Work, slot: int, now: float):
        self.number, self.work, self.slot = number, work, slot
        self.done = 0  # rows of prompt + output already in the cache
        self.output: list[int] = []
        self.logprobs: list = []
        self.admitted_s, self.first_token_s, self.end_s = now, 0.0, 0.0
        self.finish = ""

    def next_rows(self, limit: int) -> np.ndarray:
        """Token ids of the next rows: a prompt chunk, or the last sampled token."""
        prompt = self.work.tokens
        if self.done < len(prompt):
            return prompt[self.done:self.done + limit]
        return np.array(self.output[-1:])


class Batcher:
    """Requests of one leader in `micros` micro-batches of `slots` slots each.

    rows: most rows of a step; chunk: most prompt rows of one sequence in a step; score: texts
    are scored, nothing is generated. clock: seconds since the start of the run.
    """

    def __init__(self, works: list[Work], micros: int, slots: int, rows: int, chunk: int, score: bool, clock=time.monotonic):
        self.works, self.score, self.clock = works, score, clock
        self.rows, self.chunk, self.slots = rows, chunk, slots
        self.waiting = deque(range(len(works)))
        self.active: list[list[Sequence]] = [[] for _ in range(micros)]
        self.free = [list(range((m + 1) * slots - 1, m * slots - 1, -1)) for m in range(micros)]
        self.sent: list[list[tuple[Sequence, int]]] = [[] for _ in range(micros)]
        self.finished: list[Sequence] = []
        self.rounds = [0] * micros
        self.begun: list[tuple] = [()] * micros
        self.steps: list[tuple] = []  # (round, micro-batch, start_s, end_s, prefill rows, decode rows)
        self.tokens_out = 0

    @property
    def alive(self) -> bool:
        return bool(self.waiting) or any(self.active)

    def build(self, micro: int) -> tuple[Batch, np.ndarray]:
        """The next step of a micro-batch and its rows' token ids [t]."""
        while self.waiting and self.free[micro]:
            number = self.waiting.popleft()
            self.active[micro].append(Sequence(number, self.works[number], self.free[micro].pop(), self.clock()))
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
        table = np.array([(s.slot, s.done, len(tokens), self._emit(s, len(tokens)), s.number) for s, tokens in parts],
                         dtype=np.int64).reshape(-1, FIELDS)
        slot_q, start_q, count_q, emit_q, request_q = table.T
        self.sent[micro] = [(s, int(emit)) for (s, _), emit in zip(parts, emit_q)]
        for s, tokens in parts:
            s.done += len(tokens)
        self.begun[micro] = (self.rounds[micro], micro, self.clock(), prefill, len(decoding))
        self.rounds[micro] += 1
        token_t = np.concatenate([tokens for _, tokens in parts]) if parts else np.zeros(0, dtype=np.int64)
        return Batch(self.alive, prefill, Segments.of(slot_q, start_q, count_q), emit_q, request_q), token_t

    def _emit(self, s: Sequence, count: int) -> int:
        if self.score:
            return SCORED
        return SAMPLED if s.done + count >= len(s.work.tokens) else NONE

    def accept(self, micro: int, token_q: np.ndarray, logprob_n: np.ndarray) -> None:
        """Takes what the last stage made of the step sent before.

        token_q: one token per sampled segment, in order; logprob_n: one value per sampled
        segment, or per row that has a next token where texts are scored.
        """
        now, tokens, values = self.clock(), iter(token_q), iter(np.split(logprob_n, self._splits(micro)))
        for s, emit in self.sent[micro]:
            if emit == SAMPLED:
                self._take(s, int(next(tokens)), float(next(values)[0]), now)
            elif emit == SCORED:
                s.logprobs.append(next(values))
                if s.done >= len(s.work.tokens):
                    s.finish, s.first_token_s = "score", now
        self.sent[micro] = []
        number, _, start, prefill, decode = self.begun[micro]
        if prefill + decode:
            self.steps.append((number, micro, start, now, prefill, decode))
        for s in [s for s in self.active[micro] if s.finish]:
            s.end_s = now
            self.active[micro].remove(s)
            self.free[micro].append(s.slot)
            self.finished.append(s)

    def _splits(self, micro: int) -> np.ndarray:
        """Where each emitting segment's log-probabilities end."""
        sizes = [1 if emit == SAMPLED else self._scored(s) for s, emit in self.sent[micro] if emit != NONE]
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
