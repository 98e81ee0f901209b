"""The next token of each row and its log-probability, on the device: sample.cu. Letters: n row, v vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcmoe.kernels.loader import valid
from hpcmoe.model import sampler


class Draw(NamedTuple):
    """Per row n: how its token is chosen.

    temperature_n fp64 (0: the most probable token), top_k_n int32 (0: all), top_p_n fp64; seed_n, request_n uint64
    and position_n int64 (the place of the new token) are the key of the random number. given_n int32: -1 where a
    token is to be chosen, else the token whose log-probability is wanted.
    """

    temperature_n: np.ndarray
    top_k_n: np.ndarray
    top_p_n: np.ndarray
    seed_n: np.ndarray
    request_n: np.ndarray
    position_n: np.ndarray
    given_n: np.ndarray


def threads(vocab: int) -> int:
    """Threads per block: a function of the vocabulary alone, so that a row's sums do not depend on the other rows."""
    return min(1024, max(64, -(-vocab // 256) * 32))


def sample(m, logit_nv, draw: Draw, token_n, logprob_n, *, bias_v=None, workspace=None, rows=None) -> None:
    """token_n int32 and logprob_n fp64 (plain softmax, temperature 1) of logit_nv fp32 (+ bias_v fp32), in one launch.

    The tokens are those of hpcmoe.model.sampler.sample, with the same random numbers, unless u or top_p is
    within 1e-9 of a boundary between two tokens. A given token outside the vocabulary has the log-probability NaN.
    workspace: not needed. rows: int32 [1], rows that there are, or None for all.
    """
    most, vocab = logit_nv.shape
    if most == 0:
        return
    m.launch("sample.cu", "sample", (most,), (threads(vocab),),
             (logit_nv, bias_v, np.int32(vocab), *draw, token_n, logprob_n, rows, np.int32(most)))


def sample_twin(logit_nv, draw: Draw, token_n, logprob_n, *, bias_v=None, workspace=None, rows=None) -> None:
    """sample() in NumPy."""
    most, vocab = logit_nv.shape
    n = valid(rows, most)
    if n <= 0:
        return
    with np.errstate(all="ignore"):  # rows that hold inf or NaN give NaN, in silence
        logit_nv = logit_nv[:n] if bias_v is None else logit_nv[:n] + bias_v
        part = Draw(*(a[:n] for a in draw))
        chosen_n = sampler.sample(logit_nv, sampler.Sampling(*part[:5]), part.position_n)
        token_n[:n] = np.where(part.given_n < 0, chosen_n, part.given_n)
        outside_n = token_n[:n] >= vocab
        logprob_n[:n] = sampler.log_probability(logit_nv, np.where(outside_n, 0, token_n[:n]))
        logprob_n[:n][outside_n] = np.nan
