"""The share of rows that each expert gets: even, by a power law, or as a run had it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from hpcmoe.cluster.balance_run import power_law
from hpcmoe.config import ModelConfig
from hpcmoe.data.loadfile import read_load
from hpcmoe.data.routing import read_routing
from hpcmoe.errors import UserError, at

EXPECTED = "uniform, power-law:EXPONENT[:SEED], or a file expert_load.h5 or routing.h5 of a run"


def read_shares(text: str, model: ModelConfig, tokens: int) -> tuple[np.ndarray, str]:
    """(of each layer's rows the share of each expert [l, e], in words what it is).

    tokens: that draw their experts in a power law, once for the whole run. Raises UserError where the text or the file is none of
    these, or the file belongs to a model of another shape.
    """
    layers, experts = model.layers, model.router.experts
    if text == "uniform":
        return np.full((layers, experts), 1 / experts), "uniform"
    if text.startswith("power-law"):
        exponent, seed = _numbers(text)
        rows_le = power_law(exponent, experts, model.router.top_k, tokens, 1, layers, seed)[0]
        return _shares(rows_le), f"power law {exponent:g}, seed {seed}, as {tokens} tokens drew their experts"
    path = Path(text)
    if path.suffix not in (".h5", ".hdf5"):
        raise at("command line", "--load", text, EXPECTED)
    if path.name.startswith("routing"):
        return _shares(read_routing(text, model).rows_le), text
    rows_tle = read_load(text)
    if rows_tle.shape[1:] != (layers, experts):
        raise UserError(f"{text}: rows of {rows_tle.shape[1]} layers x {rows_tle.shape[2]} experts: expected {layers} x {experts}, as the "
                        "model has: another model's?")
    return _shares(rows_tle.sum(axis=0)), text


def _numbers(text: str) -> tuple[float, int]:
    try:
        _, exponent, *seed = text.split(":")
        values = float(exponent), int(seed[0]) if seed else 0
    except ValueError:
        raise at("command line", "--load", text, EXPECTED) from None
    if len(seed) > 1 or not math.isfinite(values[0]) or min(values) < 0:
        raise at("command line", "--load", text, f"{EXPECTED}, with numbers >= 0")
    return values


def _shares(rows_le: np.ndarray) -> np.ndarray:
    return rows_le / rows_le.sum(axis=1, keepdims=True)


def whole_rows(total: int, share_s: np.ndarray) -> np.ndarray:
    """`total` rows dealt to slots by their shares, as whole rows: largest remainders get what is left, the first of equal ones."""
    exact_s = total * share_s
    rows_s = np.floor(exact_s).astype(np.int64)
    left = total - int(rows_s.sum())
    rows_s[np.argsort(-(exact_s - rows_s), kind="stable")[:left]] += 1
    return rows_s
