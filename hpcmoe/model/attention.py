"""Causal attention with grouped KV heads, over the segments of one micro-batch.

A segment is a run of consecutive tokens of one sequence: a prefill chunk, or one decode row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hpcmoe.config import AttentionConfig
from hpcmoe.device import xp_of
from hpcmoe.model.dense import Norm, Rope
from hpcmoe.model.kvcache import KVCache

DECODE_BLOCK = 64  # decode rows whose scores are held at once


class Segments(NamedTuple):
    """Token rows of a micro-batch by sequence: segment q has count_q rows from position start_q on.

    The rows stand in segment order; slot_t and position_t are the same facts per row.
    """

    slot_q: np.ndarray
    start_q: np.ndarray
    count_q: np.ndarray
    slot_t: np.ndarray
    position_t: np.ndarray

    @classmethod
    def of(cls, slot_q, start_q, count_q) -> "Segments":
        first_q = np.cumsum(count_q) - count_q
        slot_t = np.repeat(slot_q, count_q)
        position_t = np.arange(int(count_q.sum())) + np.repeat(start_q - first_q, count_q)
        return cls(slot_q, start_q, count_q, slot_t, position_t)


class Attention:
    """One layer's attention: products with fixed weights, positions, the cache.

    qkv: Linear d -> (heads + 2 kv_heads) * head_dim; out: Linear heads * head_dim -> d;
    q_norm, k_norm: Norm or None.
    """

    def __init__(self, config: AttentionConfig, qkv, out, rope: Rope, q_norm: Norm | None, k_norm: Norm | None):
        self.config, self.qkv, self.out, self.rope = config, qkv, out, rope
        self.q_norm, self.k_norm = q_norm, k_norm

    def __call__(self, x_td, segments: Segments, cache: KVCache, layer: int):
        """Attention output [t, d] of normed rows x_td; appends their keys and values to the cache."""
        c = self.config
        q_thc, k_thc, v_thc = self._project(x_td)
        q_thc = self.rope(q_thc, segments.position_t)
        k_thc = self.rope(k_thc, segments.position_t)
        cache.append(layer, segments.slot_t, segments.position_t, k_thc, v_thc)
        q_thc *= np.float32(1.0 / math.sqrt(c.head_dim))
        mixed_thc = attend(q_thc, segments, cache.k[layer], cache.v[layer], c.window)
        return self.out(mixed_thc.reshape(len(x_td), c.heads * c.head_dim))

    def _project(self, x_td):
        c = self.config
        qkv = self.qkv(x_td)
        q, k, v = np.split(qkv, [c.heads * c.head_dim, (c.heads + c.kv_heads) * c.head_dim], axis=1)
        if c.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if c.clip_qkv:
            q, k, v = (part.clip(-c.clip_qkv, c.clip_qkv) for part in (q, k, v))
        q = q.reshape(len(x_td), c.heads, c.head_dim)
        k, v = (part.reshape(len(x_td), c.kv_heads, c.head_dim) for part in (k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


def attend(q_thc, segments: Segments, k_shpc, v_shpc, window: int = 0):
    """softmax(q k^T) v of scaled queries [t, head, c] against the cache [slot, kv head, position, c].

    Each row sees positions up to its own, the last `window` of them where window > 0. Heads
    share KV heads in consecutive groups (GQA, arXiv 2305.13245). Returns [t, head, c].
    """
    xp = xp_of(q_thc)
    out_thc = xp.empty_like(q_thc)
    single_q = segments.count_q == 1
    first_q = np.cumsum(segments.count_q) - segments.count_q
    for q in np.flatnonzero(~single_q):
        rows = slice(first_q[q], first_q[q] + segments.count_q[q])
        end = segments.start_q[q] + segments.count_q[q]
        slot = segments.slot_q[q]
        out_thc[rows] = _prefill(q_thc[rows], segments.position_t[rows], k_shpc[slot, :, :end],
                                 v_shpc[slot, :, :end], window)
    row_b = first_q[single_q]
    slot_b = segments.slot_q[single_q]
    order = np.argsort(slot_b, kind="stable")
    for block in np.array_split(order, max(1, -(-len(order) // DECODE_BLOCK))):
        if len(block):
            rows = row_b[block]
            out_thc[rows] = _decode(q_thc[rows], slot_b[block], segments.position_t[rows], k_shpc, v_shpc, window)
    return out_thc


def _prefill(q_thc, position_t, k_hpc, v_hpc, window: int):
    """One sequence's chunk: q [t, head, c], keys and values [kv head, p, c]."""
    xp = xp_of(q_thc)
    t, heads, c = q_thc.shape
    kv_heads, p, _ = k_hpc.shape
    q = q_thc.reshape(t, kv_heads, heads // kv_heads, c).transpose(1, 2, 0, 3).reshape(kv_heads, -1, c)
    score = (q @ k_hpc.transpose(0, 2, 1)).reshape(kv_heads, heads // kv_heads, t, p)
    score += _mask(xp, position_t, p, window)
    _softmax_in_place(score)
    mixed = score.reshape(kv_heads, -1, p) @ v_hpc
    return mixed.reshape(heads, t, c).transpose(1, 0, 2)


def _decode(q_bhc, slot_b, position_b, k_shpc, v_shpc, window: int):
    """One row of each of several sequences (ordered by slot): q [b, head, c]."""
    xp = xp_of(q_bhc)
    b, heads, c = q_bhc.shape
    kv_heads = k_shpc.shape[1]
    end = int(position_b.max()) + 1
    if slot_b[-1] - slot_b[0] + 1 == b:  # neighbouring slots: a view, no copy
        k, v = (a[slot_b[0]:slot_b[-1] + 1, :, :end] for a in (k_shpc, v_shpc))
    else:
        k, v = (a[slot_b, :, :end] for a in (k_shpc, v_shpc))
    q = q_bhc.reshape(b, kv_heads, heads // kv_heads, c)
    score = q @ k.transpose(0, 1, 3, 2)
    score += _mask(xp, position_b, end, window)[:, None, None, :]
    _softmax_in_place(score)
    return (score @ v).reshape(b, heads, c)


def _mask(xp, position_t, p: int, window: int):
    """0 where row t may look at position p, -inf elsewhere: [t, p]."""
    ahead = xp.arange(p)[None, :] - xp.asarray(position_t)[:, None]
    hidden = ahead > 0
    if window:
        hidden |= ahead <= -window
    return xp.where(hidden, np.float32(-np.inf), np.float32(0.0))


def _softmax_in_place(score) -> None:
    xp = xp_of(score)
    score -= score.max(axis=-1, keepdims=True)
    xp.exp(score, out=score)
    score /= score.sum(axis=-1, keepdims=True)
