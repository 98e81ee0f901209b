"""norm.cu against its twin, and the twin against fp64 formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.kernels.norm import _shape, norm, norm_twin
from hpcmoe.model.dtypes import to_fp32
from tests.cudabed.check import DTYPES, assert_close, count, guarded, kernels, needs_compiler, same_for_all_seeds, stored

EPS = 1e-5


def inputs(rows: int, width: int, dtype: str, *, bias=False, add=False, add_bias=False, seed=0) -> dict:
    rng = np.random.default_rng(seed)
    row = lambda: rng.normal(size=width).astype(np.float32)  # noqa: E731
    return {"x_td": rng.normal(0.3, 2, (rows, width)).astype(np.float32), "weight_d": row(),
            "bias_d": row() if bias else None, "add_bias_d": row() if add_bias else None,
            "add_td": stored(rng.normal(size=(rows, width)), dtype) if add else None}


def by_formula(i: dict, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(the residual stream after the add, its norms) in fp64."""
    x = i["x_td"].astype(np.float64)
    if i["add_td"] is not None:
        x = x + to_fp32(i["add_td"]) + (0 if i["add_bias_d"] is None else i["add_bias_d"])
    y = x - x.mean(axis=1, keepdims=True) if kind == "layer" else x
    y = y / np.sqrt((y * y).mean(axis=1, keepdims=True) + EPS) * i["weight_d"]
    return x, y if i["bias_d"] is None else y + i["bias_d"]


def run(call, i: dict, dtype: str, **options):
    x_td, same_x = guarded(i["x_td"])
    row_n = options.get("row_n")
    out_td, same_out = guarded(np.full((len(x_td) if row_n is None else len(row_n), x_td.shape[1]), 9,
                                       stored([0], dtype).dtype))
    call(x_td, out_td, i["weight_d"], eps=EPS, bias_d=i["bias_d"], add_td=i["add_td"], add_bias_d=i["add_bias_d"],
         **options)
    same_x(), same_out()
    return x_td, out_td


def on_cpu(dtype: str):
    return lambda *args, **options: norm(kernels(dtype), *args, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("add", [(False, False), (True, False), (True, True)])
def test_the_twin_follows_the_formula(dtype, kind, bias, add):
    i = inputs(5, 37, dtype, bias=bias, add=add[0], add_bias=add[1])
    x_td, out_td = run(norm_twin, i, dtype, kind=kind)
    want_x, want_y = by_formula(i, kind)
    np.testing.assert_allclose(x_td, want_x, rtol=1e-6, atol=1e-6)
    assert_close(out_td, want_y, dtype, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 32, 37, 128, 132, 1000, 2050, 4096, 4100, 5120])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_kernel_and_twin_agree_at_every_width(dtype, width, kind):
    i = inputs(2, width, dtype, bias=kind == "layer", add=True, add_bias=width % 2 == 0)
    x_td, out_td = run(on_cpu(dtype), i, dtype, kind=kind)
    twin_x, twin_out = run(norm_twin, i, dtype, kind=kind)
    np.testing.assert_array_equal(x_td, twin_x)  # sums of two numbers: one rounding, the same
    assert_close(out_td, twin_out, dtype, atol=1e-6)


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 6), width=st.integers(1, 150), valid=st.none() | st.integers(0, 8),
       kind=st.sampled_from(["rms", "layer"]), dtype=st.sampled_from(DTYPES), bias=st.booleans(),
       add=st.sampled_from([(False, False), (True, False), (True, True)]), seed=st.integers(0, 99))
def test_kernel_and_twin_agree_on_any_rows(rows, width, valid, kind, dtype, bias, add, seed):
    i = inputs(rows, width, dtype, bias=bias, add=add[0], add_bias=add[1], seed=seed)
    for_kernel, for_twin = (run(call, i, dtype, kind=kind, rows=count(valid)) for call in (on_cpu(dtype), norm_twin))
    np.testing.assert_array_equal(for_kernel[0], for_twin[0])
    assert_close(for_kernel[1], for_twin[1], dtype, atol=1e-6)
    if valid is not None:
        assert (for_kernel[1][valid:] == 9).all()
        np.testing.assert_array_equal(for_kernel[0][valid:], i["x_td"][valid:])


@needs_compiler
@pytest.mark.parametrize("width", [36, 37])
@pytest.mark.parametrize("valid", [None, 0, 2])
def test_chosen_rows(width, valid):
    i = inputs(6, width, "bf16")
    row_n = np.array([5, 0, 0, 3], np.int32)
    x_td, out_nd = run(on_cpu("bf16"), i, "bf16", row_n=row_n, rows=count(valid))
    np.testing.assert_array_equal(x_td, i["x_td"])
    n = 4 if valid is None else valid
    assert_close(out_nd[:n], by_formula(i, "rms")[1][row_n[:n]], "bf16", atol=1e-6)
    assert (out_nd[n:] == 9).all()
    np.testing.assert_array_equal(run(norm_twin, i, "bf16", row_n=row_n, rows=count(valid))[1][n:], out_nd[n:])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 41])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_extremes(dtype, width, kind):
    i = inputs(6, width, dtype, add=True)
    i["x_td"][0, 3], i["x_td"][1, 0], i["x_td"][2] = np.inf, np.nan, 0
    i["x_td"][3] *= 1e18
    i["x_td"][4, 1:] = 1e-30
    i["add_td"][2] = 0
    i["weight_d"][0] = 1e30  # beyond fp16
    with np.errstate(all="ignore"):
        for_kernel, for_twin = (run(call, i, dtype, kind=kind) for call in (on_cpu(dtype), norm_twin))
    np.testing.assert_array_equal(*(x.view(np.uint32) for x in (for_kernel[0], for_twin[0])))
    assert_close(for_kernel[1], for_twin[1], dtype, ulps=2, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("width", [260, 261])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_order_of_threads_changes_nothing(monkeypatch, width, kind):
    i = inputs(3, width, "fp16", bias=True, add=True, add_bias=True)
    same_for_all_seeds(monkeypatch, lambda: run(on_cpu("fp16"), i, "fp16", kind=kind))


def test_threads_hold_the_whole_row():
    for width in [*range(1, 300), 2048, 2880, 4096, 5120, 6144, 7168, 8192, 12288, 16384, 16388, 20000]:
        kernel, threads = _shape(width)
        assert threads % 32 == 0 and 32 <= threads <= (512 if kernel == "norm_2" else 1024)
        if kernel != "norm_any":
            assert width % 4 == 0 and threads * 4 * int(kernel[-1]) >= width
        else:
            assert width % 4 or width > 16384
    assert _shape(4096) == ("norm_2", 512) and _shape(8192) == ("norm_4", 512)


def test_chosen_rows_and_an_add_do_not_go_together():
    i = inputs(2, 8, "fp16", add=True)
    for call in (norm_twin, lambda *a, **o: norm(None, *a, **o)):
        with pytest.raises(ValueError, match="row_n"):
            run(call, i, "fp16", row_n=np.zeros(1, np.int32))


def test_no_rows_no_launch():
    run(lambda *a, **o: norm(None, *a, **o), inputs(0, 8, "fp16"), "fp16")
