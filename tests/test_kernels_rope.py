"""rope.cu against its twin, and the twin against plain loops and the model's attention."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpcmoe.kernels.rope import QK_NORMS, rope_kv, rope_kv_twin
from hpcmoe.model.attention import Attention
from hpcmoe.model.dense import Norm, Rope
from hpcmoe.model.dtypes import to_fp32
from tests.cudabed.check import DTYPES, assert_close, count, guarded, kernels, needs_compiler, same_for_all_seeds, stored

CONTEXT, EPS = 24, 1e-5
NONE = 9  # what arrays hold before


def case(rows: int, heads: int, kv_heads: int, head_dim: int, dtype: str, *, qk_norm="none", bias=False, clip=0.0,
         page_tokens=8, seed=0) -> tuple[list, dict]:
    """(arguments, options) of rope_kv: rows of distinct (slot, position), pages in no order."""
    rng = np.random.default_rng(seed)
    slots, pages = 3, -(-CONTEXT // page_tokens)
    place = rng.permutation(slots * CONTEXT)[:rows]
    width = (heads + 2 * kv_heads) * head_dim
    rope = Rope({"type": "default", "theta": 100.0}, head_dim, CONTEXT)
    each = {"none": (0, 0), "full": (heads, kv_heads), "head": (1, 1)}[qk_norm]
    q_norm, k_norm = (rng.normal(1, 0.3, n * head_dim).astype(np.float32) if n else None for n in each)
    shape, t_dtype = (slots * pages + 2, kv_heads, page_tokens, head_dim), stored([0], dtype).dtype
    args = [stored(rng.normal(0, 2, (rows, width)), dtype),
            np.full((rows, heads, head_dim), NONE, t_dtype), *(np.full(shape, NONE, t_dtype) for _ in "kv"),
            (place % CONTEXT).astype(np.int32),
            (place // CONTEXT).astype(np.int32),
            rng.permutation(slots * pages + 2)[:slots * pages].reshape(slots, pages).astype(np.int32),
            rope.cos, rope.sin]
    return args, {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_tokens": page_tokens,
                  "scale": 1 / math.sqrt(head_dim), "qk_norm": qk_norm, "q_norm": q_norm, "k_norm": k_norm, "eps": EPS,
                  "bias_x": rng.normal(size=width).astype(np.float32) if bias else None, "clip": clip}


def run(call, args: list, options: dict, **more) -> list:
    """q_thc, k_phoc, v_phoc after the call."""
    out = [guarded(array) for array in args[1:4]]
    call(args[0], *[array for array, _ in out], *args[4:], **options, **more)
    for _, same in out:
        same()
    return [array for array, _ in out]


def cpu(dtype: str):
    return lambda *args, **options: rope_kv(kernels(dtype), *args, **options)


def by_loop(args: list, o: dict) -> list:
    """The same in fp64, one number after the other; NaN where nothing is to be written."""
    qkv_tx, q_thc, k_phoc, _, position_t, slot_t, page_sp, cos_pc, sin_pc = args
    q_out, k_out, v_out = (np.full(a.shape, np.nan) for a in (q_thc, k_phoc, k_phoc))
    h, g, c = o["heads"], o["kv_heads"], o["head_dim"]
    for t, row in enumerate(to_fp32(qkv_tx).astype(np.float64)):
        x = (row if o["bias_x"] is None else row + o["bias_x"]).reshape(-1, c)
        if o["qk_norm"] == "full":
            for part, weight in ((x[:h], o["q_norm"]), (x[h:h + g], o["k_norm"])):
                part *= weight.reshape(-1, c) / math.sqrt((part**2).mean() + EPS)
        if o["clip"]:
            x = np.minimum(np.maximum(x, -o["clip"]), o["clip"])
        p = position_t[t]
        for head in range(h + g):
            if o["qk_norm"] == "head":
                x[head] *= (o["q_norm"] if head < h else o["k_norm"]) / math.sqrt((x[head]**2).mean() + EPS)
            for i in range(c // 2):
                z = complex(x[head, i], x[head, i + c // 2]) * complex(cos_pc[p, i], sin_pc[p, i])
                x[head, i], x[head, i + c // 2] = z.real, z.imag
        page, offset = page_sp[slot_t[t], p // o["page_tokens"]], p % o["page_tokens"]
        q_out[t], k_out[page, :, offset], v_out[page, :, offset] = x[:h] * o["scale"], x[h:h + g], x[h + g:]
    return [q_out, k_out, v_out]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("bias, clip", [(False, 0.0), (True, 1.5)])
def test_the_twin_is_a_plain_loop(dtype, qk_norm, bias, clip):
    args, options = case(7, 4, 2, 6, dtype, qk_norm=qk_norm, bias=bias, clip=clip)
    for got, want in zip(run(rope_kv_twin, args, options), by_loop(args, options), strict=True):
        written = ~np.isnan(want)
        assert_close(got[written], want[written], dtype, atol=1e-6)
        assert (got[~written] == NONE).all()


@pytest.mark.parametrize("qk_norm", QK_NORMS)
def test_the_twin_does_what_the_models_attention_does(qk_norm):
    """Bias in the product, then norms, clip, rotation; rounding to fp16 aside."""
    args, o = case(6, 4, 2, 8, "fp16", qk_norm=qk_norm, bias=True, clip=2.0)
    config = SimpleNamespace(heads=4, kv_heads=2, head_dim=8, qk_norm=qk_norm, clip_qkv=2.0)
    norms = [None if w is None else Norm("rms", EPS, w) for w in (o["q_norm"], o["k_norm"])]
    attention = Attention(config, lambda x: to_fp32(x) + o["bias_x"], None, None, *norms)
    q_thc, k_thc, v_thc = attention._project(args[0])
    rope = Rope({"type": "default", "theta": 100.0}, 8, CONTEXT)
    got = run(rope_kv_twin, args, o)
    page_t, offset_t = args[6][args[5], args[4] // 8], args[4] % 8
    assert_close(got[0], rope(q_thc, args[4]).astype(np.float64) * o["scale"], "fp16", atol=1e-6)
    assert_close(got[1][page_t, :, offset_t], rope(k_thc, args[4]).astype(np.float64), "fp16", atol=1e-6)
    assert_close(got[2][page_t, :, offset_t], v_thc.astype(np.float64), "fp16")


def agree(args: list, options: dict, dtype: str, **more) -> list:
    got = run(cpu(dtype), args, options, **more)
    for a, b in zip(got, run(rope_kv_twin, args, options, **more), strict=True):
        assert_close(a, b, dtype, atol=2e-6)
    return got


@needs_compiler
@settings(max_examples=25, deadline=None)
@example(rows=5, kv_heads=2, group=3, head_dim=32, dtype="fp16", qk_norm="head", bias=True, clip=1.0, valid=2, seed=1)
@example(rows=5, kv_heads=2, group=3, head_dim=22, dtype="bf16", qk_norm="full", bias=True, clip=1.0, valid=2, seed=1)
@given(rows=st.integers(0, 6), kv_heads=st.integers(1, 4), group=st.integers(1, 3),
       head_dim=st.integers(1, 40).map(lambda n: 2 * n) | st.sampled_from([16, 32, 48, 64]),
       dtype=st.sampled_from(DTYPES), qk_norm=st.sampled_from(list(QK_NORMS)), bias=st.booleans(),
       clip=st.sampled_from([0.0, 1.5]), valid=st.none() | st.integers(0, 8), seed=st.integers(0, 99))
def test_kernel_and_twin_agree(rows, kv_heads, group, head_dim, dtype, qk_norm, bias, clip, valid, seed):
    args, options = case(rows, kv_heads * group, kv_heads, head_dim, dtype, qk_norm=qk_norm, bias=bias, clip=clip,
                         seed=seed)
    got = agree(args, options, dtype, rows=count(valid))
    if valid is not None:
        assert (got[0][valid:] == NONE).all()
        assert (got[1] != NONE).any(axis=(1, 3)).sum() <= valid


@needs_compiler
@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(40, 8, 128), (16, 16, 64), (6, 2, 256), (5, 1, 254), (3, 3, 80),
                                                       (70, 2, 96), (30, 1, 130), (1, 1, 2)])
def test_heads_of_many_shapes(qk_norm, heads, kv_heads, head_dim):
    agree(*case(2, heads, kv_heads, head_dim, "bf16", qk_norm=qk_norm, bias=True, page_tokens=16), "bf16")


@needs_compiler
@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("head_dim", [16, 18])
@pytest.mark.parametrize("clip", [0.0, 1e30])
def test_extremes(qk_norm, head_dim, clip):
    """Infinities, NaN, zeros and fp16's largest: where NumPy has no number the kernel has none, and nowhere else."""
    args, options = case(6, 2, 2, head_dim, "fp16", qk_norm=qk_norm, clip=clip)
    args[0][0, 0], args[0][1, 2 * head_dim], args[0][2, -1], args[0][3] = np.inf, np.nan, -np.inf, 0
    args[0][4] = 65504
    with np.errstate(all="ignore"):
        agree(args, options, "fp16")


@needs_compiler
@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("head_dim", [48, 50])
def test_the_order_of_threads_changes_nothing(monkeypatch, qk_norm, head_dim):
    args, options = case(3, 6, 2, head_dim, "bf16", qk_norm=qk_norm, bias=True, clip=2.0)
    same_for_all_seeds(monkeypatch, lambda: run(cpu("bf16"), args, options))


@pytest.mark.parametrize("head_dim", [7, 258])
def test_heads_that_it_does_not_take_are_refused(head_dim):
    with pytest.raises(ValueError, match=f"a head of {head_dim}"):
        rope_kv(None, *[None] * 9, heads=1, kv_heads=1, head_dim=head_dim, page_tokens=8, scale=1.0)
