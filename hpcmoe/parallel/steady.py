"""Steps in which every sequence of a micro-batch decodes, and none enters or leaves: arrays take the place of loops."""

from __future__ import annotations

import numpy as np

from hpcmoe.compute.step import SAMPLED, Batch
from hpcmoe.model.attention import Segments

NO_TOKEN = -1  # fills the table of stop tokens


class Steady:
    """sequences: in the order of their slots, each with one row in the step just built.

    What comes back is kept step by step, and written into the sequences by settle().
    """

    def __init__(self, sequences: list):
        n, stops = len(sequences), max(len(s.work.stop_ids) for s in sequences)
        self.sequences = sequences
        self.slot_q, self.request_q = (np.array(values, dtype=np.int64) for values in (
            [s.slot for s in sequences], [s.work.index for s in sequences]))
        self.done_q = np.array([s.done for s in sequences], dtype=np.int64)  # after the step just built
        self.left_q = np.array([s.work.max_tokens - len(s.output) for s in sequences])
        self.stop_qs = np.array([[*s.work.stop_ids, *[NO_TOKEN] * (stops - len(s.work.stop_ids))] for s in sequences],
                                dtype=np.int64).reshape(n, stops)
        self.one_q, self.emit_q, self.no_q = np.ones(n, np.int64), np.full(n, SAMPLED, np.int64), np.zeros(n, np.int64)
        self.tokens: list[np.ndarray] = []    # since it was settled, [n] of each step
        self.logprobs: list[np.ndarray] = []
        self.token_q = self.no_q              # the last ones

    def build(self, alive: bool) -> tuple[Batch, np.ndarray]:
        """The next step and its rows' token ids [n]."""
        none = self.no_q[:0]
        segments = Segments.of(self.slot_q, self.done_q, self.one_q)
        self.done_q = self.done_q + 1
        return Batch(alive, 0, segments, self.emit_q, self.request_q, self.no_q, none, none), self.token_q

    def take(self, token_q: np.ndarray, logprob_q: np.ndarray) -> bool:
        """Keeps one token and log-probability of each; whether a sequence ends with it."""
        self.token_q = np.array(token_q, dtype=np.int64)
        self.tokens.append(self.token_q)
        self.logprobs.append(np.array(logprob_q, dtype=np.float64))
        self.left_q -= 1
        return bool((self.left_q <= 0).any() or (self.stop_qs == self.token_q[:, None]).any())

    def settle(self) -> None:
        """Writes what was taken into the sequences, and how those end that do."""
        outputs, values = (np.array(steps).T.tolist() if steps else [[]] * len(self.sequences) for steps in (self.tokens, self.logprobs))
        self.tokens, self.logprobs = [], []
        for s, done, left, output, logprobs in zip(self.sequences, self.done_q.tolist(), self.left_q.tolist(), outputs, values):
            s.done = done
            s.output += output
            s.logprobs += logprobs
            if output and output[-1] in s.work.stop_ids:
                s.finish = "stop"
            elif left <= 0:
                s.finish = "length"
