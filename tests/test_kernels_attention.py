"""attention_decode.cu and attention_prefill.cu against their twin, and the twin against a loop in fp64."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.errors import UserError
from hpcmoe.kernels.attention import TILE, Work, attention, attention_twin, splits, tiles_of, workspace_floats
from hpcmoe.kernels.loader import options, source
from hpcmoe.model.dtypes import to_fp32
from tests.cudabed import cudacpu
from tests.cudabed.check import DTYPES, count, guarded, kernels, needs_compiler, same_for_all_seeds, stored

class Case(NamedTuple):
    """Arguments of attention: those before `work`, `work`, and what out_thc holds beforehand."""

    arrays: tuple
    work: Work
    out_thc: np.ndarray
    dtype: str


def case(segments, *, dtype="fp16", heads=2, kv_heads=1, head_dim=16, page_tokens=16, window=0, spread=1.0,
         seed=0) -> Case:
    """Rows of segments (slot, start, rows), one of them each from 0 on; whatever no row may see is NaN."""
    rng = np.random.default_rng(seed)
    first_q = np.cumsum([0] + [rows for _, _, rows in segments])
    slots = max([slot for slot, _, _ in segments], default=0) + 1
    per = max([-(-(start + rows) // page_tokens) for _, start, rows in segments], default=1)
    page_sp = rng.permutation(slots * per + 2)[:slots * per].reshape(slots, per).astype(np.int32)
    kv = [rng.normal(size=(slots * per + 2, kv_heads, page_tokens, head_dim)) for _ in "kv"]
    seen_po = np.zeros((slots * per + 2, page_tokens), bool)
    for slot, start, rows in segments:
        for p in range(max(0, start + 1 - window) if window else 0, start + rows):
            seen_po[page_sp[slot, p // page_tokens], p % page_tokens] = True
    k, v = (np.where(seen_po[:, None, :, None], a, np.nan) for a in kv)
    slot_t = np.array([slot for slot, _, rows in segments for _ in range(rows)], np.int32)
    position_t = np.array([p for _, start, rows in segments for p in range(start, start + rows)], np.int32)
    q = rng.normal(size=(len(slot_t), heads, head_dim)) * spread / np.sqrt(head_dim)
    single = [n for n, (_, _, rows) in enumerate(segments) if rows == 1]
    chunks = [n for n, (_, _, rows) in enumerate(segments) if rows > 1]
    part = [[segments[n][i] for n in chunks] for i in range(3)]
    work = Work(first_q[single].astype(np.int32), None, tiles_of(first_q[chunks], part[2], part[0], part[1]), None)
    q, k, v = (stored(a, dtype) for a in (q, k, v))
    return Case((q, k, v, page_sp, slot_t, position_t), work, np.full_like(q, 9), dtype)


def run(call, c: Case, work: Work | None = None, **options):
    out_thc, same_out = guarded(c.out_thc)
    call(*c.arrays, c.work if work is None else work, out_thc, **options)
    same_out()
    return out_thc


def on_cpu(c: Case, work: Work | None = None, *, parts: int = 1, **options):
    work = c.work if work is None else work
    _, heads, head_dim = c.out_thc.shape
    floats = workspace_floats(len(work.decode_b), heads, head_dim, parts)
    workspace, same = guarded(np.full(floats, np.nan, np.float32)) if floats else (None, lambda: None)
    m = kernels(c.dtype)
    out_thc = run(lambda *a, **o: attention(m, *a, **o), c, work, splits=parts, workspace=workspace, **options)
    same()
    return out_thc


def by_rows(c: Case, window: int = 0):
    """(attention of all rows, the sum of its weights times the values' sizes), fp64, row by row."""
    q, k, v = (to_fp32(a).astype(np.float64) for a in c.arrays[:3])
    page_sp, slot_t, position_t = c.arrays[3:]
    out, size = np.zeros_like(q), np.zeros_like(q)
    group, page_tokens = q.shape[1] // k.shape[1], k.shape[2]
    for t in range(len(q)):
        low = max(0, position_t[t] + 1 - window) if window else 0
        at = [(page_sp[slot_t[t], p // page_tokens], p % page_tokens) for p in range(low, position_t[t] + 1)]
        for h in range(q.shape[1]):
            keys, values = (np.array([a[page, h // group, o] for page, o in at]) for a in (k, v))
            weight = np.exp(keys @ q[t, h] - (keys @ q[t, h]).max())
            weight /= weight.sum()
            out[t, h], size[t, h] = weight @ values, weight @ abs(values)
    return out, size


def assert_near(out_thc, want, size, dtype: str):
    """Weights rounded to T: each by half a unit in the last place at most, and so is their sum; then the result."""
    half = 2.0 ** (-11 if dtype == "fp16" else -8)
    far = abs(to_fp32(out_thc) - want) - half * (abs(want) * 1.01 + 2.0 * size) - 1e-6
    assert far.size == 0 or far.max() <= 0, f"{(far > 0).sum()} of {far.size} too far, by up to {far.max()}"


MIXED = [(1, 0, 1), (0, 17, 1), (2, 30, 5), (4, 40, 1), (3, 0, 70)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 7])
def test_the_twin_follows_the_loop(dtype, window):
    c = case(MIXED, dtype=dtype, heads=4, kv_heads=2, page_tokens=32, window=window)
    want, size = by_rows(c, window)
    assert_near(run(attention_twin, c, window=window), want, size * 0, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_mixed_rows(dtype, window, page_tokens):
    c = case(MIXED, dtype=dtype, heads=4, kv_heads=2, page_tokens=page_tokens, window=window, spread=3)
    assert_near(on_cpu(c, window=window), *by_rows(c, window), dtype)


@needs_compiler
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 6, 7, 8, 16, 20])
def test_query_heads_of_a_kv_head(ratio):
    c = case([(0, 33, 1), (1, 10, 3)], dtype="bf16", heads=2 * ratio, kv_heads=2)
    assert_near(on_cpu(c), *by_rows(c), "bf16")


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 128, 192, 256])
def test_head_dims(dtype, head_dim):
    c = case([(0, 40, 1), (1, 3, 1), (2, 30, 5)], dtype=dtype, head_dim=head_dim, spread=2)
    assert_near(on_cpu(c), *by_rows(c), dtype)


@needs_compiler
@pytest.mark.parametrize("parts", range(1, 9))
def test_splits_of_unequal_rows(parts):
    c = case([(0, 599, 1), (1, 0, 1), (2, 130, 1), (3, 63, 1), (4, 64, 1)], heads=3, kv_heads=1, head_dim=64,
             page_tokens=64)
    assert_near(on_cpu(c, parts=parts), *by_rows(c), "fp16")
    c = case([(0, 599, 1), (1, 3, 1)], window=290)
    assert_near(on_cpu(c, parts=parts, window=290), *by_rows(c, 290), "fp16")


@needs_compiler
@pytest.mark.parametrize("rows,start", [(64, 0), (65, 0), (16, 48), (17, 47), (64, 100), (2, 63), (130, 31)])
@pytest.mark.parametrize("window", [0, 40])
def test_chunks_anywhere_in_a_sequence(rows, start, window):
    c = case([(1, start, rows)], heads=1, head_dim=64, page_tokens=48, window=window, dtype="bf16")
    assert_near(on_cpu(c, window=window), *by_rows(c, window), "bf16")


@needs_compiler
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_batch(data):
    draw = lambda *a, **k: data.draw(st.integers(*a, **k))  # noqa: E731
    segments = [(slot, draw(0, 90), draw(1, 3) if draw(0, 1) else 1) for slot in range(draw(0, 4))]
    window, dtype, spread = (data.draw(st.sampled_from(a)) for a in ((0, 1, 15, 16, 17, 64), DTYPES, (0.0, 1.0, 9.0)))
    kv_heads = draw(1, 2)
    c = case(segments, dtype=dtype, heads=kv_heads * draw(1, 3), kv_heads=kv_heads, head_dim=16 * draw(1, 4),
             page_tokens=16 * draw(1, 4), window=window, seed=draw(0, 99), spread=spread)
    assert_near(on_cpu(c, window=window, parts=draw(1, 3)), *by_rows(c, window), dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_changes_nothing(dtype, monkeypatch):
    c = case([(0, 299, 1), (1, 20, 1), (2, 50, 20)], dtype=dtype, heads=4, kv_heads=2, head_dim=64)
    same_for_all_seeds(monkeypatch, lambda: [on_cpu(c, parts=3), on_cpu(c, window=70)])
    monkeypatch.setenv("CUDACPU_SEED", "3")
    assert_near(on_cpu(c, parts=3), *by_rows(c), dtype)


@needs_compiler
@pytest.mark.parametrize("n_decode,n_tiles", [(0, 0), (1, 2), (2, 1), (9, 9)])
@pytest.mark.parametrize("call", [on_cpu, lambda c, work, parts: run(attention_twin, c, work)])
def test_fewer_rows_than_the_arrays_have(n_decode, n_tiles, call):
    c = case([(0, 200, 1), (1, 3, 1), (2, 70, 1), (3, 0, 5), (4, 3, 80)])
    work = c.work._replace(n_decode=count(n_decode), n_tiles=count(n_tiles))
    out_thc = call(c, work, parts=2)
    there = np.zeros(len(out_thc), bool)
    there[work.decode_b[:n_decode]] = True
    for first, rows, _, _ in work.tile_w4[:n_tiles]:
        there[first:first + rows] = True
    want, size = by_rows(c)
    assert_near(out_thc[there], want[there], size[there], "fp16")
    assert (out_thc[~there] == 9).all()


@needs_compiler
def test_launches():
    m = kernels("fp16")
    one, chunk = [(0, 5, 1)], [(0, 5, 2)]
    for segments, parts, launches in [([], 2, 0), (one, 1, 1), (one, 2, 2), (chunk, 2, 1), (MIXED, 2, 3)]:
        before = m.launches
        on_cpu(case(segments), parts=parts)
        assert m.launches - before == launches


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_infinities_and_ties(dtype, rows):
    c = case([(0, 80, rows)], dtype=dtype, heads=2)
    q, k, _, page_sp = c.arrays[:4]
    q[:] = stored(np.array([1.0, -1.0])[None, :, None], dtype)  # head 0: +inf, so NaN; head 1: -inf, so no weight
    k[:] = stored([1.0], dtype)
    k[page_sp[0, 2], 0, 3] = stored([np.inf], dtype)
    with np.errstate(invalid="ignore"):
        want, size = by_rows(c)
    got = on_cpu(c)
    assert np.isnan(to_fp32(got[:, 0])).all() and np.isnan(want[:, 0]).all()
    assert_near(got[:, 1], want[:, 1], size[:, 1], dtype)
    q[:] = stored([200.0], dtype)  # large scores, all alike but one
    k[page_sp[0, 2], 0, 3] = stored([1.25], dtype)
    assert_near(on_cpu(c), *by_rows(c), dtype)


def test_bad_shapes():
    m = None  # nothing is launched
    for options in ({"head_dim": 24}, {"head_dim": 272}, {"page_tokens": 8}):
        with pytest.raises(UserError, match=f"{next(iter(options))} = {next(iter(options.values()))}"):
            run(lambda *a: attention(m, *a), case([(0, 3, 1)], **options))
    with pytest.raises(ValueError, match="workspace"):
        run(lambda *a: attention(m, *a, splits=2), case([(0, 3, 1)]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 500)), max_size=6))
def test_tiles_of(count_start_q):
    count_q, start_q = ([x[i] for x in count_start_q] for i in (0, 1))
    first_q = np.cumsum([0, *count_q])[:-1]
    tile_w4 = tiles_of(first_q, count_q, range(5, 5 + len(count_q)), start_q)
    assert tile_w4.dtype == np.int32 and tile_w4.shape[1] == 4
    want = [(first_q[q] + i, min(TILE, count_q[q] - i), 5 + q, start_q[q] + i)
            for q in range(len(count_q)) for i in range(0, count_q[q], TILE)]
    assert sorted(map(tuple, tile_w4.tolist())) == sorted(want)
    ends = tile_w4[:, 3] + tile_w4[:, 1]
    assert (ends[:-1] >= ends[1:]).all()


def test_splits_fill_the_device():
    class H100:
        sms = 132
    assert splits(H100, 64, 8, 4096) == 2 and splits(H100, 1, 4, 4096) == 32 and splits(H100, 1, 1, 100) == 1
    assert splits(H100, 512, 8, 4096) == 1 and splits(H100, 0, 8, 0) == 1
    assert workspace_floats(3, 4, 64, 1) == 0 and workspace_floats(3, 4, 64, 5) == 3 * 4 * 5 * 66


FRAGMENTS = """
#include "common.cuh"
using namespace nvcuda;
extern "C" __global__ void product(const T *a, const T *b, float *c, int mode) {
    CUDACPU_DYNAMIC_SHARED(float, shared);
    wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> left;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major> right;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> turned;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
    wmma::load_matrix_sync(left, a, 24);
    wmma::fill_fragment(sum, 1.0f);
    wmma::load_matrix_sync(right, b, 24);
    wmma::load_matrix_sync(turned, b, 24);
    if (mode == 0) wmma::mma_sync(sum, left, right, sum);
    if (mode == 1) wmma::mma_sync(sum, left, turned, sum);
    wmma::store_matrix_sync(c, sum, 20, mode == 2 ? wmma::mem_col_major : wmma::mem_row_major);
}
extern "C" __global__ void through_shared(const float *from, float *to, int wait, int sync) {
    CUDACPU_DYNAMIC_SHARED(float, shared);
    cudacpu::copy16(shared + threadIdx.x * 4, from + threadIdx.x * 4, threadIdx.x != 5);
    cudacpu::copies_end_group();
    if (wait) cudacpu::copies_wait(0);
    if (sync) __syncwarp();
    to[threadIdx.x] = shared[127 - threadIdx.x];
}
"""


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_fragments_and_copies_on_the_cpu(dtype, monkeypatch):
    m = cudacpu.Module(FRAGMENTS.replace('#include "common.cuh"', source("common.cuh")), options(dtype))
    rng = np.random.default_rng(0)
    flat = np.zeros((2, 16 * 24 + 16), stored([0], dtype).dtype)
    a, b = (x[(-x.ctypes.data % 32) // 2:][:16 * 24].reshape(16, 24) for x in flat)
    a[:], b[:] = stored(rng.normal(size=(2, 16, 24)), dtype)
    left, right = (to_fp32(x[:, :16]).astype(np.float64) for x in (a, b))
    for mode, want in enumerate([left @ right + 1, left @ right.T + 1]):
        c = np.zeros(16 * 20 + 8, np.float32)
        c = c[(-c.ctypes.data % 32) // 4:][:320].reshape(16, 20)
        m.get_function("product")((1,), (32,), (a, b, c, np.int32(mode)), shared_mem=64)
        np.testing.assert_allclose(c[:, :16], want, rtol=1e-5, atol=1e-5)
        assert (c[:, 16:] == 0).all()
    start = np.arange(128, dtype=np.float32)
    want = np.where((start >= 20) & (start < 24), 0, start)[::-1][:32]
    right = {}
    for seed in ("2", "3"):
        for wait, sync in [(1, 1), (0, 1), (1, 0)]:
            monkeypatch.setenv("CUDACPU_SEED", seed)
            to = np.zeros(32, np.float32)
            m.get_function("through_shared")((1,), (32,), (start, to, np.int32(wait), np.int32(sync)), shared_mem=512)
            right[seed, wait, sync] = (to == want).all()
    assert right["2", 1, 1] and right["3", 1, 1]
    assert not right["3", 0, 1] and not right["3", 1, 0]
