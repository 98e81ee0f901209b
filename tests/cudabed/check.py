"""What tests of kernels share: kernels on the CPU, stored values, comparison in units in the last place."""

import functools
import os

import numpy as np
import pytest

from hpcmoe.kernels.loader import Kernels
from hpcmoe.model.dtypes import from_fp32, to_fp32
from tests.cudabed import cudacpu

DTYPES = tuple(os.environ.get("CUDACPU_DTYPES", "fp16,bf16").split(","))
SEEDS = range(6)
needs_compiler = pytest.mark.skipif(bool(cudacpu.missing()), reason=cudacpu.missing() or "-")


@functools.cache
def kernels(dtype: str) -> Kernels:
    return Kernels(dtype, cudacpu.Module, sms=4)


def stored(values, dtype: str) -> np.ndarray:
    """Values as T."""
    return from_fp32(np.asarray(values, np.float32), dtype)


def guarded(array, beyond: int = 3):
    """(a copy of the array, the check that what lies right behind it is as it was)."""
    flat = np.concatenate([array.reshape(-1), np.full(beyond * 8, 7, array.dtype)])

    def check() -> None:
        assert (flat[array.size:] == 7).all(), "written beyond the array"
    return flat[:array.size].reshape(array.shape), check


def count(rows: int | None):
    """`rows` as kernels take it."""
    return None if rows is None else np.array([rows], np.int32)


def ulp(values, dtype: str) -> np.ndarray:
    """Distance to the next T from each fp64 value: 2^-10 (fp16) or 2^-7 (bf16) of its power of two."""
    digits, lowest = (10, -14) if dtype == "fp16" else (7, -126)
    exponent = np.frexp(np.abs(values))[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, lowest) - digits)


def assert_close(got_t, want_t, dtype: str, ulps: float = 1, atol: float = 0.0) -> None:
    """T arrays (or fp64 values as wanted) at most some units in the last place apart, NaN and infinities alike."""
    got = to_fp32(got_t).astype(np.float64)
    want = want_t if want_t.dtype == np.float64 else to_fp32(want_t).astype(np.float64)
    assert got.shape == want.shape
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    far = np.abs(got[finite] - want[finite]) - (ulps * ulp(want[finite], dtype) + atol)
    assert not far.size or far.max() <= 0, f"{(far > 0).sum()} of {far.size} values too far, by up to {far.max()}"


def same_for_all_seeds(monkeypatch, run) -> None:
    """run() -> arrays: the same bits in whatever order threads and blocks take their turns."""
    monkeypatch.delenv("CUDACPU_SEED", raising=False)
    first = run()
    for seed in SEEDS:
        monkeypatch.setenv("CUDACPU_SEED", str(seed))
        for a, b in zip(first, run(), strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
