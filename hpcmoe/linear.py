"""Products with a fixed weight: an object owns the weight in its best layout, planned once and run many times.

Backends: "numpy", and "onednn", which packs weights and can compute in bf16. What a backend makes
is described in products/base.py.
"""

from __future__ import annotations

import math
import time

import numpy as np

from hpcmoe import onednn
from hpcmoe.errors import UserError
from hpcmoe.products.arrays import NumpyBackend
from hpcmoe.products.base import Backend
from hpcmoe.products.packed import OneDnnBackend
from hpcmoe.products.primitives import layout

NAMES = ("numpy", "onednn")
DTYPES = ("fp32", "bf16")


def backends() -> dict[str, str]:
    """Backend name -> "" where it can be used here, else the reason why not."""
    return {"numpy": "", "onednn": _unavailable("fp32")}


def _unavailable(dtype: str) -> str:
    try:
        layout(onednn.load(), 64, 64, dtype)
    except onednn.Unavailable as error:
        return str(error)
    return ""


def choose(name: str = "auto", dtype: str = "fp32") -> Backend:
    """The backend of that name; "auto": oneDNN where it can be used, else NumPy.

    dtype: the arithmetic's inputs, "fp32" (also for "auto") or "bf16" (sums are fp32 in both). UserError with the
    reason where name or dtype cannot be had on this machine.
    """
    if name not in ("auto", *NAMES):
        raise UserError(f"backend = {name!r}: expected one of auto, {', '.join(NAMES)}")
    dtype = "fp32" if dtype == "auto" else dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: expected one of {', '.join(DTYPES)} on a CPU")
    if name == "numpy" or (name == "auto" and dtype == "fp32" and _unavailable("fp32")):
        if dtype != "fp32":
            raise UserError(f"dtype = {dtype!r}: the numpy backend computes in fp32 only; expected fp32, or backend onednn")
        return NumpyBackend()
    reason = _unavailable(dtype)
    if reason:
        raise UserError(f"backend = {name!r}, dtype = {dtype!r}: {reason}")
    return OneDnnBackend(dtype)


def peak(backend: Backend, rows: int = 512, n: int = 7168, k: int = 1024, seconds: float = 0.3) -> float:
    """GFLOP/s of the fastest of the products [rows, k] x [k, n] that fit in the time (three at least)."""
    product = backend.linear(np.full((n, k), 0.01, np.float32))
    x_tk, y_tn = np.full((rows, k), 0.01, np.float32), np.empty((rows, n), np.float32)
    best, runs, end = math.inf, 0, time.perf_counter() + seconds
    while runs < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        product(x_tk, out=y_tn)
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return 2e-9 * rows * n * k / best
