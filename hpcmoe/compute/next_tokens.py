"""What a leader of the last stage makes of its rows: sampled tokens, or probabilities of given ones."""

from __future__ import annotations

import numpy as np

from hpcmoe.model.sampler import Sampling, log_probability, sample
from hpcmoe.compute.step import SAMPLED, SCORED, Batch, Choices
from hpcmoe.compute.holdings import Holdings

HEAD_ROWS = 512  # rows whose logits are held at once


class NextTokens:
    """Head and sampler: `begin` a step, `draw` from the logits of its wanted rows, `answer`. choices: of all requests."""

    def __init__(self, held: Holdings, choices: Choices):
        self.held, self.choices = held, choices

    def begin(self, batch: Batch, x_td) -> None:
        """A step's rows x [t, d]: the last row of each sampled segment is wanted, and each scored one that has a next token."""
        segments = batch.segments
        wanted_t = np.zeros(batch.rows, dtype=bool)
        wanted_t[(np.cumsum(segments.count_q) - 1)[batch.emit_q == SAMPLED]] = True
        if len(batch.next_t):
            wanted_t |= batch.next_t >= 0
        self.rows = np.flatnonzero(wanted_t)
        self.x_nd, self.scored = x_td[self.rows], bool((batch.emit_q == SCORED).any())
        self.next_n = batch.next_t[self.rows] if self.scored else None
        self.request_n = np.repeat(batch.request_q, segments.count_q)[self.rows]
        self.position_n = segments.position_t[self.rows]
        self.tokens: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def parts(self) -> list[slice]:
        """The wanted rows, few enough at once."""
        return [slice(first, min(first + HEAD_ROWS, len(self.rows))) for first in range(0, len(self.rows), HEAD_ROWS)]

    def logits(self, part: slice) -> np.ndarray:
        """[n, v] of the wanted rows `part`."""
        return self.held.head(self.held.norm(self.x_nd[part]))

    def draw(self, part: slice, logit_nv: np.ndarray) -> None:
        """New tokens, or what the texts' own next ones are worth."""
        if self.scored:
            self.values.append(log_probability(logit_nv, self.next_n[part]))
            return
        token_n, logprob_n = self._new(logit_nv, self.request_n[part], self.position_n[part])
        self.tokens.append(token_n)
        self.values.append(logprob_n)

    def answer(self) -> tuple[np.ndarray, np.ndarray]:
        """(one token per sampled segment, one log-probability per token or per scored row)."""
        return (np.concatenate([np.zeros(0, dtype=np.int64), *self.tokens]), np.concatenate([np.zeros(0), *self.values]))

    def _new(self, logit_nv, request_n, position_n) -> tuple[np.ndarray, np.ndarray]:
        token_n = sample(logit_nv, Sampling(*(a[request_n] for a in self.choices.sampling)), position_n + 1)
        if self.choices.logprobs[request_n].any():
            return token_n, log_probability(logit_nv, token_n)
        return token_n, np.zeros(len(token_n))
