"""The oracle: one process, fp64, plain loops over layers, tokens, heads and experts; no cache, no batches.

Slow on purpose. It shares the router's rule and the rotary speeds with the engine, and nothing else.
"""

from __future__ import annotations

import math
from typing import Callable

import numpy as np

from hpcmoe.config import ModelConfig
from hpcmoe.model.dense import inverse_frequencies
from hpcmoe.model.dtypes import to_fp32
from hpcmoe.model.router import gate


def logits(file, tokens, context: int, seen: Callable | None = None) -> np.ndarray:
    """Logits [t, v] fp64 of every position of one sequence of token ids [t]; file: an open WeightsFile.

    seen(layer, expert_tk) is called with the choices of every layer.
    """
    m: ModelConfig = file.config
    embed_vd = _wide(file.top("embed"))
    x_td = embed_vd[np.asarray(tokens)]
    speed, factor = inverse_frequencies(m.attention.rope, m.attention.head_dim, context)
    for layer in range(m.layers):
        t = {name: _wide(a) for name, a in file.dense(layer).items()}
        x_td = x_td + _attention(m, t, _norm(m, t, "attn_norm", x_td), speed, factor)
        x_td = x_td + _moe(m, t, file, layer, _norm(m, t, "ffn_norm", x_td), seen)
    top = {"norm": _wide(file.top("norm"))}
    if m.norm == "layer":
        top["norm_bias"] = _wide(file.top("norm_bias"))
    head_vd = embed_vd if m.tied else _wide(file.top("head"))
    out_tv = _norm(m, top, "norm", x_td) @ head_vd.T
    return out_tv + _wide(file.top("head_bias")) if m.head_bias else out_tv


def _wide(array) -> np.ndarray:
    return to_fp32(array).astype(np.float64)


def _norm(m: ModelConfig, t: dict, name: str, x_td) -> np.ndarray:
    rows = []
    for x_d in x_td:
        if m.norm == "rms":
            rows.append(x_d / math.sqrt(np.mean(x_d**2) + m.norm_eps) * t[name])
        else:
            rows.append((x_d - x_d.mean()) / math.sqrt(x_d.var() + m.norm_eps) * t[name] + t[name + "_bias"])
    return np.array(rows)


def _rms(x_c, weight_c, eps: float) -> np.ndarray:
    return x_c / math.sqrt(np.mean(x_c**2) + eps) * weight_c


def _turn(x_c, position: int, speed, factor: float) -> np.ndarray:
    """One head rotated: pair i as the complex number x_i + j x_(i + half)."""
    half = len(x_c) // 2
    turned = (x_c[:half] + 1j * x_c[half:]) * np.exp(1j * position * speed) * factor
    return np.concatenate([turned.real, turned.imag])


def _attention(m: ModelConfig, t: dict, x_td, speed, factor: float) -> np.ndarray:
    a = m.attention
    q, k, v = (x_td @ t[n].T + (t[n + "_bias"] if a.bias else 0.0) for n in "qkv")
    if a.qk_norm == "full":
        q = np.array([_rms(row, t["q_norm"], m.norm_eps) for row in q])
        k = np.array([_rms(row, t["k_norm"], m.norm_eps) for row in k])
    if a.clip_qkv:
        q, k, v = (np.clip(part, -a.clip_qkv, a.clip_qkv) for part in (q, k, v))
    q, k, v = (part.reshape(len(x_td), -1, a.head_dim) for part in (q, k, v))
    out = np.zeros((len(x_td), a.heads, a.head_dim))
    for h in range(a.heads):
        g = h * a.kv_heads // a.heads
        qs, ks = q[:, h], k[:, g]
        if a.qk_norm == "head":
            qs = [_rms(row, t["q_norm"], m.norm_eps) for row in qs]
            ks = [_rms(row, t["k_norm"], m.norm_eps) for row in ks]
        qs = [_turn(row, p, speed, factor) for p, row in enumerate(qs)]
        ks = [_turn(row, p, speed, factor) for p, row in enumerate(ks)]
        for p in range(len(x_td)):
            first = max(0, p - a.window + 1) if a.window else 0
            score = np.array([qs[p] @ ks[j] for j in range(first, p + 1)]) / math.sqrt(a.head_dim)
            weight = np.exp(score - score.max())
            out[p, h] = weight @ v[first:p + 1, g] / weight.sum()
    y_td = out.reshape(len(x_td), -1) @ t["o"].T
    return y_td + t["o_bias"] if a.out_bias else y_td


def activation(name: str, x) -> np.ndarray:
    """silu, gelu (with erf), gelu_tanh, relu, in fp64."""
    if name == "silu":
        return x / (1.0 + np.exp(-x))
    if name == "gelu":
        return np.array([v * 0.5 * (1.0 + math.erf(v / math.sqrt(2.0))) for v in x])
    if name == "gelu_tanh":
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return np.maximum(x, 0.0)


def _moe(m: ModelConfig, t: dict, file, layer: int, x_td, seen) -> np.ndarray:
    expert_tk, weight_tk = gate(x_td @ t["router"].T, m.router, t.get("router_bias"))
    if seen:
        seen(layer, expert_tk)
    weights = {int(e): {n: _wide(a) for n, a in file.expert(layer, int(e)).items()} for e in np.unique(expert_tk)}
    y_td = np.zeros_like(x_td)
    for row, x_d in enumerate(x_td):
        for e, weight in zip(expert_tk[row], weight_tk[row]):
            w = weights[int(e)]
            h_f = activation(m.expert.activation, w["gate"] @ x_d) * (w["up"] @ x_d)
            y_td[row] += weight * (w["down"] @ h_f)
    return y_td
