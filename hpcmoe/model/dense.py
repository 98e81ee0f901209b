"""The dense parts that a leader computes on its token rows: norms, rotary positions, head."""

from __future__ import annotations

import math

import numpy as np

from hpcmoe.device import xp_of


def rms_norm(x_td, weight_d, eps: float):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis (Zhang & Sennrich 2019). fp32 in and out."""
    xp = xp_of(x_td)
    mean = xp.einsum("...d,...d->...", x_td, x_td) / x_td.shape[-1]
    return x_td * (1.0 / xp.sqrt(mean + eps)).astype(x_td.dtype)[..., None] * weight_d


def layer_norm(x_td, weight_d, bias_d, eps: float):
    """(x - mean) / sqrt(var + eps) * weight + bias, over the last axis (Ba et al. 2016)."""
    xp = xp_of(x_td)
    x_td = x_td - x_td.mean(axis=-1, keepdims=True)
    var = xp.einsum("...d,...d->...", x_td, x_td) / x_td.shape[-1]
    return x_td * (1.0 / xp.sqrt(var + eps)).astype(x_td.dtype)[..., None] * weight_d + bias_d


class Norm:
    """A norm with its weights; call it on x_td."""

    def __init__(self, kind: str, eps: float, weight_d, bias_d=None):
        self.kind, self.eps, self.weight_d, self.bias_d = kind, eps, weight_d, bias_d

    def __call__(self, x_td):
        if self.kind == "rms":
            return rms_norm(x_td, self.weight_d, self.eps)
        return layer_norm(x_td, self.weight_d, self.bias_d, self.eps)


# ---------------------------------------------------------------- rotary positions
def inverse_frequencies(rope: dict, head_dim: int, context: int) -> tuple[np.ndarray, float]:
    """Rotation speed of each pair of a head, [head_dim / 2] radians per token, and a factor on cos and sin.

    rope["type"]: default (Su et al., arXiv 2104.09864); linear (position interpolation, arXiv
    2306.15595); llama3 (Llama 3.1 model card); yarn (arXiv 2309.00071); longrope (arXiv 2402.13753:
    the long factors where `context` exceeds the length that the model was first trained for).
    """
    pair = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    base = rope["theta"] ** -pair
    kind = rope["type"]
    if kind == "default":
        return base, 1.0
    if kind == "linear":
        return base / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(rope, base), 1.0
    if kind == "yarn":
        return _yarn(rope, base, head_dim)
    if kind == "longrope":
        long = context > rope["original"]
        factors = np.asarray(rope["long_factor" if long else "short_factor"], dtype=np.float64)
        return base / factors, float(rope["long_mscale" if long else "short_mscale"])
    raise ValueError(f"rope type {kind!r}")


def _llama3(rope: dict, base: np.ndarray) -> np.ndarray:
    """Slow pairs are stretched by `factor`, fast ones kept, those between blended."""
    turns = rope["original"] * base / (2 * math.pi)  # full turns within the first training length
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return base * (keep + (1.0 - keep) / rope["factor"])


def _yarn(rope: dict, base: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    factor, original = rope["factor"], rope["original"]

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["theta"]))

    low, high = pair_with_turns(rope.get("beta_fast", 32.0)), pair_with_turns(rope.get("beta_slow", 1.0))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    mscale = rope.get("attention_factor") or 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return base * ((1.0 - ramp) + ramp / factor), float(mscale)


class Rope:
    """cos and sin for each position up to `context`, pairs (i, i + head_dim / 2) rotated together."""

    def __init__(self, rope: dict, head_dim: int, context: int):
        speed, factor = inverse_frequencies(rope, head_dim, context)
        angle = np.arange(context, dtype=np.float64)[:, None] * speed[None, :]
        self.cos = (np.cos(angle) * factor).astype(np.float32)
        self.sin = (np.sin(angle) * factor).astype(np.float32)

    def __call__(self, x_thc, position_t):
        """Rotates x [t, h, head_dim] by its rows' positions; returns a new array."""
        xp = xp_of(x_thc)
        cos, sin = self.cos[position_t][:, None, :], self.sin[position_t][:, None, :]
        half = x_thc.shape[-1] // 2
        a, b = x_thc[..., :half], x_thc[..., half:]
        out = xp.empty_like(x_thc)
        out[..., :half] = a * cos - b * sin
        out[..., half:] = b * cos + a * sin
        return out
