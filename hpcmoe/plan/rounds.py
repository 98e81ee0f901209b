"""The steps of equal requests that a micro-batch takes in all at once, and which of them are enough to know the time of all.

The rows of each step are those of the engine's Batcher (parallel/batch.py), found without it: no request is told from another but by
how far it is. Steps that follow each other in a run of their kind (with prompt rows, or decode alone) are much alike: each run is cut
into a few neighbourhoods of consecutive rounds, one round stands for each, and the one before it is kept so that it finds the pipeline
as its neighbours would leave it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcmoe.simulate.workload import Rows, blocks

MIXED, DECODE, UNEVEN = 4, 2, 4  # neighbourhoods of a run: with prompt rows; decode of the same requests; decode of ever fewer
NONE = Rows(np.zeros(0, int), np.zeros(0, int), 0.0, 0, 0, 0, 0)


class Short(NamedTuple):
    """The rounds of one micro-batch on one leader that are kept. rows_r: their rows, the last ones empty; weight_r: for how many rounds each
    stands; point_r: (a kept round, for how many), fewer of them, for bounds; first_q, end_q: of each request, before which round of the
    whole its first token, and its last, is known."""

    rows_r: list[Rows]
    weight_r: list[float]
    point_r: list[tuple[int, float]]
    first_q: np.ndarray
    end_q: np.ndarray


def rounds_of(requests: int, rows: int, chunk: int, prompt: int, outputs: int, window: int, empty: int = 1, whole: bool = False) -> Short:
    """The rounds of so many requests of `prompt` tokens with `outputs` tokens to come; rows: most of a step; chunk: most prompt rows of a
    request in a step; window: of the attention (0: none); empty: rounds at the end that find nothing left; whole: keep every round."""
    runs, first_q, end_q = _runs(requests, rows, chunk, prompt, outputs, window)
    kept, weight, points = [], [], []
    for run in runs:
        start = len(kept)
        for low, high in _neighbourhoods(run, whole):
            best = run.nearest(low, high)
            if high - low > 1:
                best = max(best, low + 1)
                kept.append(run.at(best - 1))
                weight.append(1.0)
            kept.append(run.at(best))
            weight.append(float(max(1, high - low - 1)))
        points += run.points(start, kept[start:], weight[start:])
    return Short(kept + [NONE] * empty, weight + [1.0] * empty, points, first_q, end_q)


def _far(some: list[Rows], all_: list[Rows]) -> np.ndarray:
    """How far rounds are from the mean of all: in the scores that attention has to make, and in the tokens that are sampled."""
    some, all_ = (np.array([(rows.keys + float((rows.count_q * (rows.start_q + rows.count_q / 2)).sum()), rows.wanted) for rows in x], dtype=float)
                  for x in (some, all_))
    mean = all_.mean(axis=0)
    return (abs(some - mean) / np.maximum(mean, 1e-9)).sum(axis=1)


def _neighbourhoods(run, whole: bool) -> list[tuple[int, int]]:
    parts = run.count if whole or run.count <= 2 * run.parts else run.parts
    ends = [run.count * i // parts for i in range(parts + 1)]
    return list(zip(ends, ends[1:]))


class _Mixed:
    """Rounds with equally many rows, prompt rows among them."""

    parts = MIXED

    def __init__(self, rows: Rows):
        self.made = [rows]

    @property
    def count(self) -> int:
        return len(self.made)

    def at(self, i: int) -> Rows:
        return self.made[i]

    def nearest(self, low: int, high: int) -> int:
        """The round that is most nearly what those from low on, before high, are on average."""
        return low + int(np.argmin(_far(self.made[low:high], self.made[low:high])))

    def points(self, start: int, kept: list[Rows], weights: list[float]) -> list[tuple[int, float]]:
        return [(start + int(np.argmin(_far(kept, self.made))), float(self.count))]


class _Decode:
    """Rounds in which requests give one row each: stretches (rounds, tokens in the cache of each request at its start, the requests' slots)."""

    def __init__(self, window: int):
        self.stretches: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.window = window

    @property
    def parts(self) -> int:
        return DECODE if len(self.stretches) == 1 else UNEVEN

    @property
    def count(self) -> int:
        return sum(n for n, _, _ in self.stretches)

    def at(self, i: int) -> Rows:
        for n, done_q, slot_q in self.stretches:
            if i < n:
                return _rows(done_q + i, np.zeros_like(done_q), np.ones(len(done_q), bool), len(done_q), self.window, slot_q)
            i -= n
        raise IndexError(i)

    def nearest(self, low: int, high: int) -> int:
        return (low + high) // 2

    def points(self, start: int, kept: list[Rows], weights: list[float]) -> list[tuple[int, float]]:
        """One where all requests go on; else all that are kept."""
        if self.parts == UNEVEN:
            return [(start + i, weight) for i, weight in enumerate(weights)]
        return [(start + (len(kept) - 1) // 2, float(self.count))]


def _runs(requests: int, rows: int, chunk: int, prompt: int, outputs: int, window: int) -> tuple[list, np.ndarray, np.ndarray]:
    """(runs of rounds in order, first_q, end_q)."""
    done_q, out_q = np.zeros(requests, dtype=np.int64), np.zeros(requests, dtype=np.int64)
    first_q, end_q, at, runs = np.zeros(requests, dtype=np.int64), np.zeros(requests, dtype=np.int64), 0, []
    while (active_q := out_q < outputs).any():
        decode_q = active_q & (done_q >= prompt)
        if (decode_q == active_q).all():
            n = int(outputs - out_q[active_q].max())
            long = n > 2 * UNEVEN  # a run of its own
            if long or not runs or not isinstance(runs[-1], _Decode) or runs[-1].stretches[-1][0] > 2 * UNEVEN:
                runs.append(_Decode(window))
            runs[-1].stretches.append((n, done_q[active_q], np.flatnonzero(active_q)))
            done_q[active_q] += n
            sampled_q = active_q
        else:
            need_q = np.where(active_q & ~decode_q, np.minimum(prompt - done_q, chunk), 0)
            take_q = np.clip(rows - int(decode_q.sum()) - (np.cumsum(need_q) - need_q), 0, need_q)
            sampled_q, n = decode_q | ((take_q > 0) & (done_q + take_q >= prompt)), 1
            made = _rows(done_q, take_q, decode_q, int(sampled_q.sum()), window, np.arange(requests))
            if runs and isinstance(runs[-1], _Mixed) and runs[-1].at(0).count == made.count:
                runs[-1].made.append(made)
            else:
                runs.append(_Mixed(made))
            done_q = done_q + take_q + decode_q
        at += n
        first_q[sampled_q & (out_q == 0)] = at
        out_q[sampled_q] += n
        end_q[sampled_q & (out_q == outputs)] = at
    return runs, first_q, end_q


def _rows(done_q, take_q, decode_q, wanted: int, window: int, slot_q) -> Rows:
    """One step: decode_q give a row each, others take_q rows of their prompts (as simulate/workload.py has them)."""
    one_q, some_q = decode_q | (take_q == 1), take_q > 1
    padded, apart = blocks(slot_q[one_q], done_q[one_q] + 1)
    keys_q, start_q, count_q = done_q[one_q] + 1, done_q[some_q], take_q[some_q]
    if window:
        keys_q, start_q = np.minimum(keys_q, window), np.minimum(start_q, np.maximum(window - count_q, 0))
    return Rows(start_q, count_q, float(keys_q.sum()), int(one_q.sum()), wanted, int(take_q.sum()), int(decode_q.sum()), padded, apart)
