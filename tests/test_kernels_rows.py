"""merge.cu, embed.cu and rows.cu against their twins, and the twins against plain loops."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpcmoe.kernels.chunks import chunks_of
from hpcmoe.kernels.embed import embed, embed_twin
from hpcmoe.kernels.merge import merge, merge_twin, sum_rows, sum_rows_twin
from hpcmoe.kernels.rows import gather_rows, gather_rows_twin, scatter_rows, scatter_rows_twin
from hpcmoe.model.dtypes import from_fp32, to_fp32
from tests.cudabed.check import DTYPES, count, guarded, kernels, needs_compiler, same_for_all_seeds, stored

WIDTHS = st.integers(1, 17).map(lambda n: 4 * n) | st.integers(1, 70) | st.sampled_from([128, 516, 1030, 1032, 2052])
few = settings(max_examples=25, deadline=None)


@given(columns=st.integers(1, 40000), per_thread=st.integers(1, 16))
def test_chunks_hold_every_column(columns, per_thread):
    chunks = chunks_of(columns, per_thread)
    assert chunks.threads % 32 == 0 and 32 <= chunks.threads <= 128
    covered = chunks.per_row * chunks.threads * per_thread
    assert covered >= columns and covered - columns < chunks.per_row * 32 * per_thread + chunks.threads * per_thread


# ---------------------------------------------------------------- merge
def merge_inputs(rows: int, width: int, k: int, dtype: str, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, width)).astype(np.float32), stored(rng.normal(0, 4, (rows * k + 2, width)), dtype),
            rng.random((rows, k)).astype(np.float32), rng.permutation(rows * k).reshape(rows, k).astype(np.int32))


def merged(call, x_td, y_sd, weight_tk, slot_tk, **options):
    x_td, same = guarded(x_td)
    call(x_td, y_sd, weight_tk, slot_tk, **options)
    same()
    return x_td


def test_the_merge_twin_is_a_sum_in_fp64():
    x_td, y_sd, weight_tk, slot_tk = merge_inputs(4, 9, 3, "bf16")
    want = x_td.astype(np.float64)
    for t in range(4):
        for k in range(3):
            want[t] += weight_tk[t, k].astype(np.float64) * to_fp32(y_sd[slot_tk[t, k]])
    np.testing.assert_allclose(merged(merge_twin, x_td, y_sd, weight_tk, slot_tk), want, rtol=1e-6, atol=1e-5)


def cpu(call, dtype="fp16"):
    return lambda *args, **options: call(kernels(dtype), *args, **options)


@needs_compiler
@few
@example(rows=4, width=36, k=2, dtype="fp16", valid=1, seed=0)
@example(rows=4, width=37, k=2, dtype="fp16", valid=1, seed=0)
@given(rows=st.integers(0, 5), width=WIDTHS, k=st.integers(1, 9), dtype=st.sampled_from(DTYPES),
       valid=st.none() | st.integers(0, 7), seed=st.integers(0, 99))
def test_merge(rows, width, k, dtype, valid, seed):
    given_ = merge_inputs(rows, width, k, dtype, seed)
    got = merged(cpu(merge, dtype), *given_, rows=count(valid))
    want = merged(merge_twin, *given_, rows=count(valid))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-5)
    if valid is not None:
        np.testing.assert_array_equal(got[valid:], given_[0][valid:])


@needs_compiler
@pytest.mark.parametrize("width", [24, 25])
def test_merge_sums_in_the_order_of_the_choices(width):
    """2^24 + 1 - 2^24 is 0 in fp32, and 1 in any other order."""
    y_sd = stored(np.ones((4, width)), "fp16")
    weight_tk = np.array([[2.0**24, 1.0, -2.0**24, 0.0]], np.float32)
    x_td = merged(cpu(merge), np.zeros((1, width), np.float32), y_sd, weight_tk, np.array([[3, 1, 0, 2]], np.int32))
    assert (x_td == 0).all()


@needs_compiler
@pytest.mark.parametrize("width", [8, 9])
def test_merge_passes_infinities_and_nan_on(width):
    x_td, y_sd, weight_tk, slot_tk = merge_inputs(3, width, 2, "bf16")
    x_td[0, 1], weight_tk[1, 0] = np.nan, np.inf
    y_sd[slot_tk[2]] = stored([np.inf], "bf16")
    weight_tk[2] = 1, -1
    with np.errstate(invalid="ignore"):
        want = merged(merge_twin, x_td, y_sd, weight_tk, slot_tk)
    np.testing.assert_allclose(merged(cpu(merge, "bf16"), x_td, y_sd, weight_tk, slot_tk), want, rtol=2e-6, atol=1e-5)


def with_gaps(slot_tk, share: float, seed: int):
    """Some slots, all or none of them without a row."""
    return np.where(np.random.default_rng(seed).random(slot_tk.shape) < share, -1, slot_tk).astype(np.int32)


def plain_sum(x_td, y_sd, weight_tk, slot_tk):
    """A loop in fp32: the order of choices, and no choice without a slot."""
    x_td, y_sd = x_td.copy(), to_fp32(y_sd)
    for t, k in zip(*np.nonzero(slot_tk >= 0)):
        x_td[t] += weight_tk[t, k] * y_sd[slot_tk[t, k]]
    return x_td


@needs_compiler
@few
@example(rows=4, width=36, k=6, share=1.0, dtype="fp16", valid=None, seed=0)
@example(rows=4, width=37, k=5, share=0.0, dtype="bf16", valid=1, seed=0)
@given(rows=st.integers(0, 5), width=WIDTHS, k=st.integers(1, 9), share=st.sampled_from([0.0, 0.5, 1.0]),
       dtype=st.sampled_from(DTYPES), valid=st.none() | st.integers(0, 7), seed=st.integers(0, 99))
def test_choices_without_a_row_add_nothing(rows, width, k, share, dtype, valid, seed):
    x_td, y_sd, weight_tk, slot_tk = merge_inputs(rows, width, k, dtype, seed)
    slot_tk = with_gaps(slot_tk, share, seed)
    y_sd[np.setdiff1d(np.arange(len(y_sd)), slot_tk)] = stored([np.nan], dtype)  # nobody asks for them
    want = plain_sum(x_td, y_sd, weight_tk, slot_tk)
    n = rows if valid is None else min(rows, valid)
    for call in (cpu(merge, dtype), merge_twin):
        got = merged(call, x_td, y_sd, weight_tk, slot_tk, some=True, rows=count(valid))
        np.testing.assert_allclose(got[:n], want[:n], rtol=2e-6, atol=1e-5)
        np.testing.assert_array_equal(got[n:], x_td[n:])
    total_td = plain_sum(np.zeros_like(x_td), y_sd, weight_tk, slot_tk)
    for call in (cpu(sum_rows, dtype), sum_rows_twin):
        got = merged(call, stored(np.full_like(x_td, 9), dtype), y_sd, weight_tk, slot_tk)
        np.testing.assert_allclose(to_fp32(got), to_fp32(from_fp32(total_td, dtype)), rtol=0.01, atol=1e-5)


# ---------------------------------------------------------------- embed
def embedded(call, table_vd, token_t, **options):
    x_td, same = guarded(np.full((len(token_t), table_vd.shape[1]), 9, np.float32))
    call(table_vd, token_t, x_td, **options)
    same()
    return x_td


@needs_compiler
@few
@example(rows=4, width=36, dtype="fp16", valid=1, first_id=0, seed=0)
@example(rows=4, width=37, dtype="fp16", valid=1, first_id=2, seed=0)
@given(rows=st.integers(0, 5), width=WIDTHS, dtype=st.sampled_from(DTYPES), valid=st.none() | st.integers(0, 7),
       first_id=st.integers(0, 3), seed=st.integers(0, 99))
def test_embed(rows, width, dtype, valid, first_id, seed):
    """Ids that the table does not hold (those of other tensor shards) give zero rows."""
    rng = np.random.default_rng(seed)
    table_vd = stored(rng.normal(size=(7, width)), dtype)
    table_vd[1, 0], table_vd[2, 0] = stored([np.inf, np.nan], dtype)
    token_t = rng.integers(0, 7 + 2 * first_id, rows).astype(np.int32)
    n = rows if valid is None else min(rows, valid)
    for call in (embed_twin, cpu(embed, dtype)):
        x_td = embedded(call, table_vd, token_t, first_id=first_id, rows=count(valid))
        for t in range(rows):
            held = 0 <= token_t[t] - first_id < 7
            np.testing.assert_array_equal(x_td[t], 9 if t >= n else to_fp32(table_vd[token_t[t] - first_id]) if held else 0)


# ---------------------------------------------------------------- gather, scatter
def copied(call, source_id, index_i, out_rows: int, **options):
    out_id, same = guarded(np.full((out_rows, *source_id.shape[1:]), 9, source_id.dtype))
    call(source_id, index_i, out_id, **options)
    same()
    return out_id


@needs_compiler
@few
@example(rows=40, shape=(64,), dtype="f4", valid=39, seed=0)
@given(rows=st.integers(0, 40), shape=st.sampled_from([(), (1,), (3,), (8,), (2, 5), (64,), (1030,), (2050,), (0,)]),
       dtype=st.sampled_from(["u1", "f2", "f4", "i8"]), valid=st.none() | st.integers(0, 50), seed=st.integers(0, 99))
def test_gather_and_scatter(rows, shape, dtype, valid, seed):
    rng = np.random.default_rng(seed)
    source_id = rng.integers(0, 200, (11, *shape)).astype(dtype)
    index_i = rng.integers(0, 11, rows).astype(np.int32)
    n = rows if valid is None else min(rows, valid)
    for call in (gather_rows_twin, cpu(gather_rows)):
        out_id = copied(call, source_id, index_i, rows, rows=count(valid))
        for i in range(rows):
            np.testing.assert_array_equal(out_id[i], source_id[index_i[i]] if i < n else 9)
    source_id = rng.integers(0, 200, (rows, *shape)).astype(dtype)
    index_i = rng.permutation(rows + 4)[:rows].astype(np.int32)
    for call in (scatter_rows_twin, cpu(scatter_rows)):
        out_id = copied(call, source_id, index_i, rows + 4, rows=count(valid))
        for i in range(rows + 4):
            at = np.flatnonzero(index_i[:n] == i)
            np.testing.assert_array_equal(out_id[i], source_id[at[0]] if len(at) else 9)


def test_rows_of_another_shape_or_type_are_refused():
    index_i = np.zeros(1, np.int32)
    for out_id in (np.zeros((1, 3), np.float32), np.zeros((1, 2), np.float16)):
        for call in (gather_rows, scatter_rows):
            with pytest.raises(ValueError, match="rows of float32"):
                call(None, np.zeros((1, 2), np.float32), index_i, out_id)


@needs_compiler
@pytest.mark.parametrize("width", [132, 133])
def test_the_order_of_threads_changes_nothing(monkeypatch, width):
    given_ = merge_inputs(3, width, 3, "fp16")
    token_t = np.array([2, 0, 2, 1], np.int32)
    same_for_all_seeds(monkeypatch, lambda: (
        merged(cpu(merge), *given_), merged(cpu(merge), *given_[:3], with_gaps(given_[3], 0.5, 1), some=True),
        merged(cpu(sum_rows), stored(given_[0], "fp16"), *given_[1:3], with_gaps(given_[3], 0.5, 1)), embedded(cpu(embed), given_[1], token_t),
        copied(cpu(gather_rows), given_[1], token_t, 4), copied(cpu(scatter_rows), given_[1][:3], token_t[1:], 3)))
