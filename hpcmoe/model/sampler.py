"""The next token of each sequence from its logits; random numbers that depend on nothing but their key.

A number is a function of (seed, request, position): Philox 4x32-10 (Salmon et al., SC11), so
neither the rank count nor what else is in the batch can change a sampled token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcmoe.device import xp_of


class Sampling(NamedTuple):
    """Per row n: temperature (0: greedy), top_k (0: all), top_p, seed, request (its place in the input)."""

    temperature_n: np.ndarray
    top_k_n: np.ndarray
    top_p_n: np.ndarray
    seed_n: np.ndarray
    request_n: np.ndarray


def philox(counter_4n, key_2n):
    """Philox 4x32-10: four words per column, uint64 arrays holding 32-bit values: [4, n] -> [4, n]."""
    xp = xp_of(counter_4n)
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = (xp.array(c) for c in counter_4n)
    k0, k1 = (xp.array(k) for k in key_2n)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return xp.stack([c0, c1, c2, c3])


def uniform(seed_n, request_n, position_n):
    """One double in [0, 1) per row, with 53 random bits."""
    xp = xp_of(seed_n)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    seed, request, position = (xp.asarray(a).astype(np.uint64) for a in (seed_n, request_n, position_n))
    counter = xp.stack([position & low, position >> shift, request & low, request >> shift])
    word = philox(counter, xp.stack([seed & low, seed >> shift]))
    return ((word[0] >> np.uint64(5)) * 67108864.0 + (word[1] >> np.uint64(6))) / 9007199254740992.0


def log_softmax(logit_nv):
    """log(softmax) over the vocabulary, in fp64 sums: [n, v] fp32."""
    xp = xp_of(logit_nv)
    shifted = logit_nv - logit_nv.max(axis=1, keepdims=True)
    return shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def log_probability(logit_nv, token_n):
    """log p of the given tokens under the plain softmax (temperature 1): fp64 [n]."""
    xp = xp_of(logit_nv)
    top_n = logit_nv.max(axis=1)
    total_n = xp.exp(logit_nv - top_n[:, None]).sum(axis=1, dtype=np.float64)
    rows = xp.arange(len(logit_nv))
    return logit_nv[rows, token_n].astype(np.float64) - top_n - xp.log(total_n)


def sample(logit_nv, sampling: Sampling, position_n):
    """token_n int64: greedy rows take the largest logit (the first among equals), others draw.

    position_n is the place of the new token in its sequence. Drawing: logits / temperature,
    cut to the top_k largest, then to the smallest set whose probability reaches top_p.
    """
    xp = xp_of(logit_nv)
    token_n = logit_nv.argmax(axis=1).astype(np.int64)
    drawn = xp.flatnonzero(sampling.temperature_n > 0)
    if len(drawn):
        part = Sampling(*(a[drawn] for a in sampling))
        u = uniform(part.seed_n, part.request_n, position_n[drawn])
        token_n[drawn] = _draw(logit_nv[drawn], part, u)
    return token_n


def _draw(logit_nv, sampling: Sampling, u_n):
    """Inverse of the cumulated distribution at u, over tokens from the most to the least probable."""
    xp = xp_of(logit_nv)
    vocab = logit_nv.shape[1]
    order_nv = xp.argsort(-logit_nv, axis=1, kind="stable")
    scaled = xp.take_along_axis(logit_nv, order_nv, axis=1).astype(np.float64)
    scaled /= sampling.temperature_n[:, None]
    rank_v = xp.arange(vocab)
    limit_n = xp.where(sampling.top_k_n > 0, xp.minimum(sampling.top_k_n, vocab), vocab)
    p = xp.exp(scaled - scaled[:, :1]) * (rank_v[None, :] < limit_n[:, None])
    p /= p.sum(axis=1, keepdims=True)
    before = xp.cumsum(p, axis=1) - p
    p *= (before < sampling.top_p_n[:, None]) | (rank_v[None, :] == 0)
    cumulated = xp.cumsum(p, axis=1)
    target = u_n * cumulated[:, -1]
    place = (cumulated <= target[:, None]).sum(axis=1)
    last = (p > 0).sum(axis=1) - 1  # rounding may put the target on the very end
    return xp.take_along_axis(order_nv, xp.minimum(place, last)[:, None], axis=1)[:, 0]
