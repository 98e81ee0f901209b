"""One step of a micro-batch on a leader, as it travels from stage to stage, and what leaders know of requests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcmoe.model.attention import Segments
from hpcmoe.model.sampler import Sampling

HEAD, ROWS = 4, 2  # alive, segments, rows, prefill rows
FIELDS = 6  # per segment: slot, start, count, emit, request, pages
NONE, SAMPLED, SCORED = 0, 1, 2  # emit: nothing, the token after the last row, every row's next token


class Batch(NamedTuple):
    """One step of one micro-batch on one leader, as it travels from stage to stage.

    alive: the leader still has work, or may get more. request_q: the request's place in the input.
    n_page_q: pages of the KV cache that a segment brings, where a sequence begins (else 0; always 0
    where a page is a slot); page_n: their numbers, one segment's after the other's. next_t: where texts
    are scored, the token after each row (-1: none is wanted), else empty: it travels with the step, so that
    the last stage needs no request's text.
    """

    alive: bool
    prefill_rows: int
    segments: Segments
    emit_q: np.ndarray
    request_q: np.ndarray
    n_page_q: np.ndarray
    page_n: np.ndarray
    next_t: np.ndarray = np.zeros(0, dtype=np.int64)

    @property
    def rows(self) -> int:
        return len(self.segments.slot_t)

    def header(self) -> np.ndarray:
        s = self.segments
        body = np.stack([s.slot_q, s.start_q, s.count_q, self.emit_q, self.request_q, self.n_page_q], axis=1)
        return np.concatenate([[self.alive, len(s.slot_q), self.rows, self.prefill_rows], body.reshape(-1),
                               self.page_n, self.next_t]).astype(np.int64)

    @classmethod
    def of(cls, header: np.ndarray) -> "Batch":
        alive, segments, rows, prefill = header[:HEAD]
        end = HEAD + FIELDS * segments
        slot_q, start_q, count_q, emit_q, request_q, n_page_q = header[HEAD:end].reshape(-1, FIELDS).T
        pages_end = end + n_page_q.sum()
        given = rows if (emit_q == SCORED).any() else 0
        return cls(bool(alive), int(prefill), Segments.of(slot_q, start_q, count_q), emit_q, request_q, n_page_q,
                   header[end:pages_end], header[pages_end:pages_end + given])


def header_size(rows: int, pages: int = 0) -> int:
    """Numbers in the header of a step of at most `rows` rows, with a KV cache of so many pages."""
    return HEAD + (FIELDS + 1) * rows + pages


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

    @property
    def most_tokens(self) -> int:
        """Of its longest possible text."""
        return len(self.tokens) + self.max_tokens


class Choices(NamedTuple):
    """How next tokens are chosen, for all requests of a job by their places in the input: what the last stage
    needs to know of requests. logprobs: whether log-probabilities are wanted, bool."""

    sampling: Sampling
    logprobs: np.ndarray

    @classmethod
    def of(cls, works: list[Work], requests: int) -> "Choices":
        """Of a job of so many requests; those that are not in `works` stay 0."""
        types = (np.float64, np.int64, np.float64, np.uint64, bool)
        columns = [np.zeros(requests, dtype=t) for t in types]
        index = [w.index for w in works]
        values = zip(*[(w.temperature, w.top_k, w.top_p, w.seed % 2**64, w.logprobs) for w in works])
        for column, value in zip(columns, values):
            column[index] = np.array(value, dtype=column.dtype)
        return cls(Sampling(*columns[:4], np.arange(requests, dtype=np.uint64)), columns[4])
