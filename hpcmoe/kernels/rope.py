"""From the q|k|v product to rotated queries and the paged cache: bias, QK norm, clip, rotary positions, append."""

from __future__ import annotations

import numpy as np

from hpcmoe.kernels.loader import valid
from hpcmoe.model.dense import rms_norm
from hpcmoe.model.dtypes import from_fp32, name_of, to_fp32

QK_NORMS = {"none": 0, "full": 1, "head": 2}  # as in rope.cu
MOST_THREADS, WIDEST_HEAD = 512, 256


def rope_kv(m, qkv_tx, q_thc, k_phoc, v_phoc, position_t, slot_t, page_sp, cos_pc, sin_pc, *, heads: int, kv_heads: int,
            head_dim: int, page_tokens: int, scale: float, qk_norm: str = "none", q_norm=None, k_norm=None,
            eps: float = 0.0, bias_x=None, clip: float = 0.0, rows=None) -> None:
    """qkv_tx T [R, (heads + 2 kv_heads) head_dim], q then k then v, to q_thc and the cache. One launch.

    In this order, in fp32, rounded once: + bias_x fp32; qk_norm "full" (RMS over all heads of q, and
    of k, weights q_norm and k_norm fp32 as wide); to +-clip where clip > 0; qk_norm "head" (RMS per
    head, weights [head_dim]); pairs (i, i + head_dim / 2) of q and k turned by cos_pc and sin_pc fp32
    [context, head_dim / 2] at position_t int32 [R] (Su et al., arXiv 2104.09864); q times scale.

    q -> q_thc T [R, heads, head_dim]. k, v -> k_phoc, v_phoc T [pages, kv_heads, page_tokens,
    head_dim] at page page_sp[slot_t, position_t // page_tokens], offset position_t % page_tokens;
    slot_t int32 [R], page_sp int32 [slots, pages of a sequence]. rows int32 [1]: only so many rows.
    ValueError: head_dim odd or above 256.
    """
    if head_dim % 2 or not 0 < head_dim <= WIDEST_HEAD:
        raise ValueError(f"rope_kv: a head of {head_dim}; it takes even ones up to {WIDEST_HEAD}")
    most = len(qkv_tx)
    if most == 0:
        return
    vector = 8 if head_dim % 16 == 0 else 1
    lanes = min(32, 1 << (head_dim // 2 // vector - 1).bit_length())
    threads = min(MOST_THREADS, -(-(heads + 2 * kv_heads) * lanes // 32) * 32)
    sizes = most, heads, kv_heads, head_dim, page_tokens, page_sp.shape[1], QK_NORMS[qk_norm], lanes
    m.launch("rope.cu", f"rope_{vector}", (most,), (threads,),
             (qkv_tx, q_thc, k_phoc, v_phoc, position_t, slot_t, page_sp, rows, cos_pc, sin_pc, q_norm, k_norm, bias_x,
              *(np.int32(size) for size in sizes), np.float32(eps), np.float32(clip), np.float32(scale)))


def rope_kv_twin(qkv_tx, q_thc, k_phoc, v_phoc, position_t, slot_t, page_sp, cos_pc, sin_pc, *, heads: int,
                 kv_heads: int, head_dim: int, page_tokens: int, scale: float, qk_norm: str = "none", q_norm=None,
                 k_norm=None, eps: float = 0.0, bias_x=None, clip: float = 0.0, rows=None) -> None:
    """rope_kv on host arrays."""
    n = valid(rows, len(qkv_tx))
    qkv = to_fp32(qkv_tx[:n])
    if bias_x is not None:
        qkv = qkv + bias_x
    q, k, v = np.split(qkv, [heads * head_dim, (heads + kv_heads) * head_dim], axis=1)
    if qk_norm == "full":
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    if clip > 0:
        q, k, v = (part.clip(-np.float32(clip), np.float32(clip)) for part in (q, k, v))
    q, k, v = (part.reshape(n, part.shape[1] // head_dim, head_dim) for part in (q, k, v))
    if qk_norm == "head":
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    position, dtype = position_t[:n], name_of(qkv_tx.dtype)
    cos, sin = cos_pc[position], sin_pc[position]
    q_thc[:n] = from_fp32(_rotated(q, cos, sin) * np.float32(scale), dtype)
    page, offset = page_sp[slot_t[:n], position // page_tokens], position % page_tokens
    k_phoc[page, :, offset] = from_fp32(_rotated(k, cos, sin), dtype)
    v_phoc[page, :, offset] = from_fp32(v, dtype)


def _rotated(x_thc, cos_tc, sin_tc):
    """Pairs (i, i + head_dim / 2) turned by their row's angles, as hpcmoe.model.dense.Rope does."""
    a, b = np.split(x_thc, 2, axis=2)
    cos, sin = cos_tc[:, None], sin_tc[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)
