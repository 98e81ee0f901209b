"""shards.cu against its twins, and the twins against plain loops."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpcmoe.kernels.shards import (add_rows, add_rows_twin, narrow, narrow_twin, place_columns, place_columns_twin, sum_parts,
                                   sum_parts_twin)
from hpcmoe.model.dtypes import from_fp32, to_fp32
from tests.cudabed.check import DTYPES, guarded, kernels, needs_compiler, same_for_all_seeds, stored

few = settings(max_examples=25, deadline=None)
ROWS, WIDTHS = st.integers(0, 5), st.sampled_from([1, 3, 4, 8, 31, 64, 129, 520])


def both(launcher, twin, dtype: str, inputs: tuple, target):
    """What the kernel and the twin make of a copy of `target`."""
    found = []
    for call in (lambda *args: launcher(kernels(dtype), *args), twin):
        out, same = guarded(target.copy())
        call(*inputs, out)
        same()
        found.append(out)
    return found


@needs_compiler
@few
@example(rows=2, width=4, shards=8, dtype="fp16", seed=0)
@given(rows=ROWS, width=WIDTHS, shards=st.integers(1, 8), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_the_sum_is_made_in_the_order_of_the_shards(rows, width, shards, dtype, seed):
    """A plain loop in fp32, rounded once at the end: the same bits."""
    parts_jtd = stored(np.random.default_rng(seed).normal(0, 30, (shards, rows, width)), dtype)
    want = np.zeros((rows, width), np.float32)
    for t in range(rows):
        for c in range(width):
            for j in range(shards):
                want[t, c] = np.float32(want[t, c] + to_fp32(parts_jtd)[j, t, c])
    got, twin = both(sum_parts, sum_parts_twin, dtype, (parts_jtd,), np.full((rows, width), 9, parts_jtd.dtype))
    np.testing.assert_array_equal(twin, from_fp32(want, dtype))
    np.testing.assert_array_equal(got, twin)


@needs_compiler
@few
@given(rows=ROWS, width=WIDTHS, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_narrow_and_add(rows, width, dtype, seed):
    rng = np.random.default_rng(seed)
    x_td = rng.normal(0, 30, (rows, width)).astype(np.float32)
    y_td = stored(rng.normal(0, 30, (rows, width)), dtype)
    got, twin = both(narrow, narrow_twin, dtype, (x_td,), np.full_like(y_td, 9))
    np.testing.assert_array_equal(twin, from_fp32(x_td, dtype))
    np.testing.assert_array_equal(got, twin)
    got, twin = both(add_rows, add_rows_twin, dtype, (y_td,), x_td)
    np.testing.assert_array_equal(twin, x_td + to_fp32(y_td))
    np.testing.assert_array_equal(got, twin)


@needs_compiler
@few
@given(rows=ROWS, widths=st.lists(st.integers(0, 40), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_columns_of_all_shards_stand_side_by_side(rows, widths, seed):
    blocks = [np.random.default_rng(seed + i).normal(size=(rows, w)).astype(np.float32) for i, w in enumerate(widths)]
    for call in (lambda *args: place_columns(kernels("fp16"), *args), place_columns_twin):
        out, same = guarded(np.full((rows, sum(widths)), 9, np.float32))
        first = 0
        for block in blocks:
            call(block, out, first)
            first += block.shape[1]
        same()
        np.testing.assert_array_equal(out, np.concatenate(blocks, axis=1))


@needs_compiler
@pytest.mark.parametrize("width", [64, 63])
def test_the_order_of_threads_changes_nothing(monkeypatch, width):
    parts_jtd = stored(np.random.default_rng(0).normal(size=(3, 5, width)), "bf16")
    same_for_all_seeds(monkeypatch, lambda: both(sum_parts, sum_parts_twin, "bf16", (parts_jtd,), np.zeros((5, width), np.uint16)))
