"""Products with a fixed weight: every backend against float64, on any shape; what cannot be had is refused by name."""

import math
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe import linear, onednn
from hpcmoe.errors import UserError
from hpcmoe.model.dtypes import from_fp32, to_fp32
from hpcmoe.products import primitives
from hpcmoe.products.widen import widen

ROWS = (0, 1, 2, 7, 8, 9, 16, 33, 64, 80, 81, 1000)
EPS = 2.0**-23
ACTIVATIONS = {
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu": lambda v: 0.5 * v * (1 + np.vectorize(math.erf, otypes=[float])(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: np.maximum(v, 0),
}


def needs(name: str, dtype: str) -> None:
    reason = linear._unavailable(dtype) if name == "onednn" else ""
    if reason:
        pytest.skip(f"{name} {dtype}: {reason}")


@pytest.fixture(params=["numpy", "onednn"])
def backend(request):
    needs(request.param, "fp32")
    return linear.choose(request.param)


@pytest.fixture
def packing():
    needs("onednn", "fp32")
    return linear.choose("onednn")


def normal(seed: int, *shape) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_product(y_tn, x_tk, weight_nk, bias_n=None):
    """Within what sums of k fp32 terms, in any order that keeps errors from all adding up, may be off by."""
    x, w = x_tk.astype(np.float64), weight_nk.astype(np.float64)
    expected, size = x @ w.T, np.abs(x) @ np.abs(w).T
    if bias_n is not None:
        expected, size = expected + bias_n, size + np.abs(bias_n)
    assert y_tn.dtype == np.float32 and y_tn.flags.c_contiguous and y_tn.shape == expected.shape
    assert (np.abs(y_tn - expected) <= (2 + math.sqrt(w.shape[1])) * EPS * size).all()


# ---------------------------------------------------------------- the product
@pytest.mark.parametrize("name", ["numpy", "onednn"])
@settings(max_examples=60, deadline=None)
@given(rows=st.sampled_from(ROWS), n=st.integers(1, 200), k=st.integers(1, 200), bias=st.booleans(),
       stored=st.sampled_from(["fp32", "fp16", "bf16"]), seed=st.integers(0, 9))
def test_product_of_any_shape(name, rows, n, k, bias, stored, seed):
    needs(name, "fp32")
    weight_nk = from_fp32(normal(seed, n, k), stored)
    bias_n = normal(seed + 1, n) if bias else None
    x_tk = normal(seed + 2, rows, k)
    product = linear.choose(name).linear(weight_nk, bias_n)
    assert (product.n, product.k) == (n, k) and product.nbytes >= 4 * n * k
    assert_product(product(x_tk), x_tk, to_fp32(weight_nk), bias_n)


@pytest.mark.parametrize("n, k", [(48, 2049), (50, 4100), (1000, 1000), (3584, 1024), (512, 3584), (7, 14336), (32, 2048)])
def test_product_of_large_shapes(backend, n, k):
    """Around the borders where a product is cut: along k beyond 2048 columns, along t beyond a slab."""
    weight_nk, bias_n = normal(1, n, k), normal(2, n)
    product = backend.linear(weight_nk.astype(np.float16), bias_n)
    for rows in ROWS[:-1] + (79, 161, 260):
        x_tk = normal(rows, rows, k)
        assert_product(product(x_tk), x_tk, weight_nk.astype(np.float16), bias_n)


def test_rows_do_not_disturb_each_other(backend):
    weight_nk, x_tk = normal(1, 96, 2100), normal(2, 200, 2100)
    product = backend.linear(weight_nk)
    x_tk[[0, 77, 150]] = np.nan
    y_tn = product(x_tk)
    good = np.setdiff1d(np.arange(200), [0, 77, 150])
    assert np.isnan(y_tn[[0, 77, 150]]).all()
    assert_product(np.ascontiguousarray(y_tn[good]), x_tk[good], weight_nk)


def test_out_is_filled_and_nothing_beyond_it(backend):
    product, x_tk = backend.linear(normal(1, 33, 65)), normal(2, 90, 65)
    held = np.full((92, 33), np.nan, np.float32)
    y_tn = product(x_tk, out=held[1:91])
    assert y_tn.base is held or y_tn is held[1:91] or np.shares_memory(y_tn, held)
    assert np.isnan(held[[0, 91]]).all() and not np.isnan(held[1:91]).any()
    np.testing.assert_array_equal(held[1:91], product(x_tk))


def test_rows_of_other_layouts_and_dtypes(backend):
    weight_nk, x_tk = normal(1, 20, 30), normal(2, 11, 30)
    product = backend.linear(weight_nk)
    expected = product(x_tk)
    np.testing.assert_array_equal(product(np.asfortranarray(x_tk)), expected)
    np.testing.assert_array_equal(product(np.repeat(x_tk, 2, axis=1)[:, ::2]), expected)
    np.testing.assert_array_equal(product(x_tk.astype(np.float64)), expected)
    bits = from_fp32(x_tk, "bf16")
    np.testing.assert_array_equal(product(bits), product(to_fp32(bits)))


@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("view", ["rows", "columns", "transposed", "reversed", "read-only"])
def test_weights_of_any_strides(backend, stored, view):
    big = from_fp32(normal(1, 240, 260), stored)
    weight_nk = {"rows": big[::2], "columns": big[:, 7:107], "transposed": big.T, "reversed": big[::-1], "read-only": big}[view]
    big.flags.writeable = view != "read-only"
    x_tk = normal(2, 5, weight_nk.shape[1])
    assert_product(backend.linear(weight_nk)(x_tk), x_tk, to_fp32(np.ascontiguousarray(weight_nk)))


def test_source_may_go_after_packing(backend):
    weight_nk, x_tk, bias_n = normal(1, 64, 64), normal(2, 3, 64), normal(3, 64)
    product = backend.linear(weight_nk, bias_n)
    expected = product(x_tk)
    weight_nk[:], bias_n[:] = np.nan, np.nan
    np.testing.assert_array_equal(product(x_tk), expected)


def test_wrong_shapes_are_refused(backend):
    product = backend.linear(normal(1, 8, 16))
    for bad in (normal(1, 3, 15), normal(1, 16)):
        with pytest.raises(ValueError, match="expected"):
            product(bad)
    x_tk = normal(1, 3, 16)
    for bad in (np.empty((3, 7), np.float32), np.empty((3, 8)), np.empty((8, 3), np.float32).T):
        with pytest.raises(ValueError, match="expected contiguous float32"):
            product(x_tk, out=bad)


# ---------------------------------------------------------------- the gated unit
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("f, d", [(33, 17), (256, 64), (40, 2100)])
def test_gated_unit_against_closed_form(backend, act, f, d):
    gate_fd, up_fd = normal(1, f, d) * 3 / math.sqrt(d), normal(2, f, d)
    unit = backend.glu(gate_fd, up_fd.astype(np.float16), act)
    assert (unit.n, unit.k) == (f, d) and unit.nbytes >= 8 * f * d
    up_fd = up_fd.astype(np.float16)
    for rows in ROWS:
        x_td = normal(rows, rows, d)
        x = x_td.astype(np.float64)
        gate, up = x @ gate_fd.T.astype(np.float64), x @ up_fd.T.astype(np.float64)
        size = (np.abs(x) @ np.abs(gate_fd.T)) * np.abs(up) + (np.abs(x) @ np.abs(up_fd.T)) * np.abs(gate)
        h_tf = unit(x_td)
        assert h_tf.dtype == np.float32 and h_tf.shape == (rows, f)
        error = np.abs(h_tf - ACTIVATIONS[act](gate) * up)
        assert (error <= 3 * (2 + math.sqrt(d)) * EPS * size + 1e-6 * np.abs(up)).all()


def test_gated_unit_of_extreme_gates(backend):
    """e^-x overflows for gates below -88: the unit is then 0, without a warning."""
    x_td = np.array([[-200.0], [-90.0], [0.0], [90.0]], np.float32)
    unit = backend.glu(np.ones((1, 1), np.float32), np.ones((1, 1), np.float32), "silu")
    with np.errstate(all="raise", under="ignore"):
        h_tf = unit(x_td)
    np.testing.assert_allclose(h_tf[:, 0], [0, 0, 0, 8100], atol=1e-30)


@pytest.mark.parametrize("f, d", [(96, 40), (2100, 40), (33, 2100), (4500, 17)])
def test_expert_against_closed_form(backend, f, d):
    """A whole expert as the model makes it: its hidden width, or the rows, may be cut into parts."""
    gate_fd, up_fd, down_df = normal(1, f, d) / math.sqrt(d), normal(2, f, d) / math.sqrt(d), normal(3, d, f) / math.sqrt(f)
    expert = backend.expert(gate_fd, up_fd, down_df, "silu")
    assert (expert.n, expert.k) == (d, d) and expert.nbytes >= 12 * f * d
    for rows in (0, 1, 2, 80, 81, 170):
        x_td, y_td = normal(4, rows, d), np.full((rows, d), np.nan, np.float32)
        h = ACTIVATIONS["silu"](x_td.astype(float) @ gate_fd.T) * (x_td.astype(float) @ up_fd.T)
        assert expert(x_td, out=y_td) is y_td
        np.testing.assert_allclose(y_td, h @ down_df.T, atol=1e-5)
        np.testing.assert_allclose(expert(x_td), backend.linear(down_df)(backend.glu(gate_fd, up_fd)(x_td)), atol=1e-5)


def test_expert_of_parts_that_do_not_fit_is_refused(backend):
    with pytest.raises(ValueError):
        backend.expert(normal(1, 8, 16), normal(2, 8, 16), normal(3, 8, 16))(normal(4, 2, 16))


# ---------------------------------------------------------------- what the packed weights promise
def test_packing_needs_no_second_copy(packing):
    weight_nk = np.zeros((2048, 2048), np.float16)
    packing.linear(weight_nk)
    tracemalloc.start()
    product = packing.linear(weight_nk)  # the packed bytes are mapped, which tracemalloc does not count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5e6 < product.nbytes / 6
    assert product.nbytes == 4 * weight_nk.size


def test_primitives_are_made_once_per_rows_and_dropped(packing, monkeypatch):
    monkeypatch.setattr(primitives, "SHAPES_KEPT", 3)
    weight_nk = normal(1, 40, 56)
    product, other = packing.linear(weight_nk), packing.linear(weight_nk * 2)
    for rows in (1, 2, 3, 4, 5, 1, 5, 2):
        x_tk = normal(rows, rows, 56)
        np.testing.assert_array_equal(2 * product(x_tk), other(x_tk))
        assert_product(product(x_tk), x_tk, weight_nk)
    assert product._products[0] is other._products[0] and len(product._products[0].shapes) == 3


def test_threads_share_a_product(packing):
    weight_nk = normal(1, 96, 64)
    product = packing.linear(weight_nk)
    wrong = []

    def work(seed):
        for rows in (3, 50, 170, 3) * 10:
            x_tk = normal(seed + rows, rows, 64)
            y_tn = product(x_tk)
            if np.abs(y_tn - x_tk @ weight_nk.T).max() > 1e-4:
                wrong.append((seed, rows))

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------- dtypes
def test_every_fp16_is_widened_as_numpy_does():
    values = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(64, 1024)
    for rows in (values, values[np.isfinite(values).all(axis=1)]):  # with and without infinities and NaNs
        wide = np.empty(rows.shape, np.float32)
        widen(wide, rows)
        np.testing.assert_array_equal(wide, rows.astype(np.float32))


def test_every_bf16_is_widened():
    bits = np.arange(65536, dtype=np.uint16).reshape(64, 1024)
    wide = np.empty(bits.shape, np.float32)
    widen(wide, bits)
    np.testing.assert_array_equal(wide.view(np.uint32), bits.astype(np.uint32) << 16)


@settings(max_examples=500)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**126), max_value=2.0**126))
def test_bf16_rounding_picks_the_nearest(value):
    """The oracle of the bf16 tests: nearer of the two neighbours in exact arithmetic, the even one of a tie."""
    below = np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)  # towards zero
    ends = [float(np.uint32(bits).view(np.float32)) for bits in (below, below + np.uint32(0x10000))]
    away = [abs(value - end) for end in ends]
    even = 0 if (int(below) >> 16) % 2 == 0 else 1
    nearest = ends[even] if away[0] == away[1] else ends[int(np.argmin(away))]
    assert float(to_fp32(from_fp32(np.array([value], np.float32), "bf16"))[0]) == nearest


@pytest.fixture
def bf16():
    needs("onednn", "bf16")
    return linear.choose("onednn", "bf16")


def rounded(values) -> np.ndarray:
    return to_fp32(from_fp32(values, "bf16"))


@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("n, k", [(33, 17), (64, 64), (200, 999), (96, 2100)])
def test_bf16_product(bf16, n, k, stored):
    weight_nk, bias_n = from_fp32(normal(1, n, k), stored), normal(2, n)
    product = bf16.linear(weight_nk, bias_n)
    assert product.nbytes < 4 * (n + 64) * (k + 64)
    for rows in ROWS:
        x_tk = normal(rows, rows, k)
        assert_product(product(x_tk), rounded(x_tk), rounded(to_fp32(weight_nk)), bias_n)
        np.testing.assert_array_equal(product(from_fp32(x_tk, "bf16")), product(x_tk))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bf16_gated_unit(bf16, act):
    gate_fd, up_fd, x_td = normal(1, 72, 100) / 5, normal(2, 72, 100), normal(3, 90, 100)
    gate, up = rounded(x_td) @ rounded(gate_fd).T, rounded(x_td) @ rounded(up_fd).T
    np.testing.assert_allclose(bf16.glu(gate_fd, up_fd, act)(x_td), ACTIVATIONS[act](gate.astype(float)) * up, atol=3e-4)


def test_bf16_is_had_or_refused_with_the_reason():
    reason = linear._unavailable("bf16")
    if reason:
        with pytest.raises(UserError) as caught:
            linear.choose("auto", "bf16")
        assert reason in str(caught.value) and "bf16" in str(caught.value)
    else:
        assert linear.choose("auto", "bf16").dtype == "bf16"


# ---------------------------------------------------------------- choosing
def test_auto_takes_the_best_there_is():
    usable = linear.backends()["onednn"] == ""
    assert linear.choose().name == ("onednn" if usable else "numpy")


def test_backend_names_itself(backend):
    assert backend.name in ("numpy", "onednn") and backend.dtype == "fp32"
    assert backend.version[0].isdigit() and backend.threads >= 1
    assert linear.peak(backend, rows=8, n=64, k=64, seconds=0.0) > 0


@pytest.mark.parametrize("name, dtype, words", [
    ("mkl", "fp32", ["'mkl'", "auto, numpy, onednn"]),
    ("numpy", "bf16", ["'bf16'", "numpy", "fp32"]),
    ("auto", "fp16", ["'fp16'", "fp32, bf16"]),
])
def test_unknown_names_are_refused(name, dtype, words):
    with pytest.raises(UserError) as caught:
        linear.choose(name, dtype)
    assert all(word in str(caught.value) for word in words)


def test_unknown_activation_is_refused(backend):
    with pytest.raises(UserError, match="'tanh'"):
        backend.glu(normal(1, 4, 4), normal(2, 4, 4), "tanh")


@pytest.mark.parametrize("value, words", [("off", "HPCMOE_ONEDNN=off"), ("/nowhere/libdnnl.so.3", "/nowhere/libdnnl.so.3"),
                                          ("libc.so.6", "libc.so.6 is no oneDNN library")])
def test_without_onednn(monkeypatch, value, words):
    monkeypatch.setenv(onednn.ENV, value)
    assert words in linear.backends()["onednn"]
    assert linear.choose().name == "numpy"
    for dtype in ("fp32", "bf16"):
        with pytest.raises(UserError) as caught:
            linear.choose("onednn", dtype)
        assert words in str(caught.value)
    with pytest.raises(UserError, match="bf16"):
        linear.choose("auto", "bf16")


def test_a_site_library_is_taken(packing, monkeypatch):
    monkeypatch.setenv(onednn.ENV, packing.library.path)
    again = linear.choose("onednn")
    assert again.version == packing.version
    x_tk = normal(1, 3, 9)
    assert_product(again.linear(normal(2, 5, 9))(x_tk), x_tk, normal(2, 5, 9))


@pytest.mark.gpu
def test_weights_on_a_device():
    cupy = pytest.importorskip("cupy")
    weight_nk, x_tk = normal(1, 40, 30), normal(2, 7, 30)
    backend = linear.choose("numpy")
    y_tn = backend.linear(cupy.asarray(weight_nk), cupy.asarray(normal(3, 40)))(cupy.asarray(x_tk))
    assert_product(y_tn.get(), x_tk, weight_nk, normal(3, 40))
    for act, closed in ACTIVATIONS.items():
        h_tf = backend.glu(cupy.asarray(weight_nk), cupy.asarray(weight_nk), act)(cupy.asarray(x_tk)).get()
        gate = x_tk.astype(float) @ weight_nk.T
        np.testing.assert_allclose(h_tf, closed(gate) * gate, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- weights that travel
@pytest.mark.parametrize("name, dtype", [("numpy", "fp32"), ("onednn", "fp32"), ("onednn", "bf16")])
@pytest.mark.parametrize("d, f", [(32, 24), (40, 5000)])
def test_weights_written_over_a_clones_make_the_other_expert(name, dtype, d, f):
    """The bytes of one expert in the memory of a clone of another: the same results, bit by bit, and nobody else's change."""
    from hpcmoe.config import ExpertConfig
    from hpcmoe.model.experts import Expert, pattern
    try:
        backend = linear.choose(name, dtype)
    except UserError as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(1)
    shapes = {"gate": (f, d), "up": (f, d), "down": (d, f)}
    one, other = (Expert(ExpertConfig(f), backend, {n: rng.normal(0, 0.1, s).astype(np.float32) for n, s in shapes.items()}) for _ in range(2))
    x_id = rng.normal(0, 1, (7, d)).astype(np.float32)
    before, want = one(x_id), other(x_id)
    spare, clone = pattern(ExpertConfig(f), backend, shapes), one.clone()
    np.testing.assert_array_equal(clone(x_id), before)
    for target in (spare, clone):
        for a, b in zip(target.weights(), other.weights(), strict=True):
            a[:] = b
        np.testing.assert_array_equal(target(x_id), want)
        assert target.nbytes == sum(w.nbytes for w in target.weights())
    np.testing.assert_array_equal(one(x_id), before)
