"""What a leader of the last stage makes of its rows: sampled tokens, or probabilities of given ones."""

from __future__ import annotations

import numpy as np

from hpcmoe.model.sampler import Sampling, log_probability, sample
from hpcmoe.parallel.batch import SAMPLED, SCORED, Batch, Work
from hpcmoe.parallel.holdings import Holdings

HEAD_ROWS = 512  # rows whose logits are held at once


class NextTokens:
    """Head and sampler over a leader's requests."""

    def __init__(self, held: Holdings, works: list[Work]):
        self.held, self.works = held, works
        columns = list(zip(*[(w.temperature, w.top_k, w.top_p, w.seed % 2**64, w.index) for w in works])) or [()] * 5
        types = (np.float64, np.int64, np.float64, np.uint64, np.uint64)
        self.sampling = Sampling(*(np.array(column, dtype=t) for column, t in zip(columns, types)))

    def __call__(self, batch: Batch, x_td) -> tuple[np.ndarray, np.ndarray]:
        """(one token per sampled segment, one log-probability per token or per scored row) of rows x [t, d]."""
        segments, emit_q = batch.segments, batch.emit_q
        request_t = np.repeat(batch.request_q, segments.count_q)
        scored_t = np.repeat(emit_q == SCORED, segments.count_q)
        wanted_t = np.zeros(len(request_t), dtype=bool)
        wanted_t[(np.cumsum(segments.count_q) - 1)[emit_q == SAMPLED]] = True
        for t in np.flatnonzero(scored_t):  # a text's last token has no next one
            wanted_t[t] = segments.position_t[t] + 1 < len(self.works[request_t[t]].tokens)
        rows = np.flatnonzero(wanted_t)
        tokens, values = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
        for first in range(0, len(rows), HEAD_ROWS):
            part = rows[first:first + HEAD_ROWS]
            next_tokens = self._given if scored_t[part].any() else self._new
            logit_nv = self.held.head(self.held.norm(x_td[part]))
            token_n, logprob_n = next_tokens(logit_nv, request_t[part], segments.position_t[part])
            tokens.append(token_n)
            values.append(logprob_n)
        return np.concatenate(tokens), np.concatenate(values)

    def _given(self, logit_nv, request_n, position_n) -> tuple[np.ndarray, np.ndarray]:
        """No new token, and the log-probabilities of the texts' own next ones."""
        given_n = np.array([self.works[r].tokens[p + 1] for r, p in zip(request_n, position_n)])
        return np.zeros(0, dtype=np.int64), log_probability(logit_nv, given_n)

    def _new(self, logit_nv, request_n, position_n) -> tuple[np.ndarray, np.ndarray]:
        token_n = sample(logit_nv, Sampling(*(a[request_n] for a in self.sampling)), position_n + 1)
        if any(self.works[r].logprobs for r in request_n):
            return token_n, log_probability(logit_nv, token_n)
        return token_n, np.zeros(len(token_n))
