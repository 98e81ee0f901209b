"""swiglu.cu against its twin, and the twin against the functions of the math module."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpcmoe.kernels.swiglu import ACTS, swiglu, swiglu_twin
from hpcmoe.model.dtypes import to_fp32
from tests.cudabed.check import DTYPES, assert_close, count, guarded, kernels, needs_compiler, same_for_all_seeds, stored

PLAIN = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
}
WIDTHS = st.integers(1, 9).map(lambda n: 8 * n) | st.integers(1, 70) | st.sampled_from([128, 1032, 2056, 2047])
ATOL = 3e-6  # where 1 + erf cancels, times an `up` of a few


def run(call, both_if, act: str, **options):
    out_if, same = guarded(np.full((len(both_if), both_if.shape[1] // 2), 9, both_if.dtype))
    call(both_if, out_if, act=act, **options)
    same()
    return out_if


def cpu(dtype: str):
    return lambda *args, **options: swiglu(kernels(dtype), *args, **options)


def inputs(rows: int, width: int, dtype: str, seed: int = 0):
    return stored(np.random.default_rng(seed).normal(0, 3, (rows, 2 * width)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_the_twin_follows_the_formula(dtype, act):
    both_if = inputs(6, 50, dtype)
    gate, up = np.split(to_fp32(both_if).astype(np.float64), 2, axis=1)
    want = np.vectorize(PLAIN[act])(gate) * up
    assert_close(run(swiglu_twin, both_if, act), want, dtype, atol=ATOL)


@needs_compiler
@settings(max_examples=40, deadline=None)
@example(rows=4, width=24, act="silu", dtype="fp16", valid=1, seed=0)
@example(rows=4, width=25, act="silu", dtype="fp16", valid=1, seed=0)
@given(rows=st.integers(0, 5), width=WIDTHS, act=st.sampled_from(list(ACTS)), dtype=st.sampled_from(DTYPES),
       valid=st.none() | st.integers(0, 7), seed=st.integers(0, 99))
def test_kernel_and_twin_agree(rows, width, act, dtype, valid, seed):
    both_if = inputs(rows, width, dtype, seed)
    got, want = (run(call, both_if, act, rows=count(valid)) for call in (cpu(dtype), swiglu_twin))
    assert_close(got, want, dtype, atol=ATOL)
    if valid is not None:
        assert (got[valid:] == 9).all()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("width", [16, 17])
def test_extremes(dtype, act, width):
    """Large, small, infinite and no numbers: as NumPy has them. gelu's series in the twin has no value at infinity."""
    values = [np.inf, -np.inf, np.nan, 0.0, -0.0, 6e4, -6e4, 100, -100, 1e-7, -1e-7, 20, -20, 1, -1, 11]
    gate = np.resize(values, width)
    both_if = stored(np.stack([np.concatenate([gate, np.full(width, up)]) for up in (1, -2, 3e4, 0, np.inf)]), dtype)
    with np.errstate(all="ignore"):
        got, want = run(cpu(dtype), both_if, act), run(swiglu_twin, both_if, act)
    where = np.isfinite(np.tile(gate, (5, 1))) if act == "gelu" else np.ones(got.shape, bool)
    large = np.isfinite(to_fp32(want)) & (np.abs(to_fp32(both_if[:, width:])) > 4) & where
    assert_close(got[where & ~large], want[where & ~large], dtype, atol=ATOL)
    assert_close(got[large], want[large], dtype, atol=0.05)  # 3e4 times the difference of two erf


@needs_compiler
@pytest.mark.parametrize("width", [264, 263])
def test_the_order_of_threads_changes_nothing(monkeypatch, width):
    both_if = inputs(3, width, "bf16")
    same_for_all_seeds(monkeypatch, lambda: (run(cpu("bf16"), both_if, "silu"),))
