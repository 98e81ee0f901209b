"""Section `kernels`: the rate of each kernel against the rate of copies measured in the same run.

Bytes are the least that a kernel must move: each input read once, each output written once.
"""

from __future__ import annotations

from typing import Callable, Iterator, NamedTuple

import numpy as np

from hpcmoe.bench.bed import Bed
from hpcmoe.bench.record import LATE, Section
from hpcmoe.bench.timing import Deadline, Timed, ring
from hpcmoe.config import RouterConfig
from hpcmoe.kernels import attention, embed, merge, norm, permute, rope, router, rows, sample, swiglu
from hpcmoe.kernels.e4m3 import fp8_width

SECONDS = 0.2  # per kernel


class Load(NamedTuple):
    """One kernel at one size: make() gives a call on buffers of its own. goal: (figure, relation, wanted) or None."""

    name: str
    make: Callable[[], Callable[[], None]]
    nbytes: int
    flop: float = 0.0
    goal: tuple[str, str, float] | None = None


def run(bed: Bed, section: Section, deadline: Deadline) -> None:
    """Times every kernel; fills in GB/s, share of the copy rate, microseconds and the goals."""
    copy = bed.copy_gb_per_s()
    section.figures["copy_gb_per_s"] = copy
    for load in loads(bed):
        if deadline.over:
            section.status, section.error = LATE, f"{load.name} and what follows it were left out"
            return
        calls = [load.make() for _ in range(ring(load.nbytes, bed.small))]
        timed = bed.timer(calls, SECONDS)
        del calls
        _record(section, load, timed, copy)


def _record(section: Section, load: Load, timed: Timed, copy: float) -> None:
    rate = 1e-6 * load.nbytes / timed.ms
    found = {"time_us": 1e3 * timed.ms, "rate_gb_per_s": rate, "share_of_copy": rate / copy}
    section.add_point("kernels", kernel=load.name, **found, least_us=1e3 * timed.least_ms, most_us=1e3 * timed.most_ms,
                      **({"rate_tflop_per_s": 1e-9 * load.flop / timed.ms} if load.flop else {}))
    if load.goal:
        figure, relation, wanted = load.goal
        section.goal(f"{load.name}, {figure}", relation, wanted, found[figure])


def loads(bed: Bed) -> Iterator[Load]:
    """All kernels at the sizes of the goals (or tiny ones), each made when its turn comes."""
    t, d = (16, 64) if bed.small else (4096, 4096)
    yield from norms(bed, t, d)
    yield from moves(bed, t, d)
    yield from routers(bed, *((8, 16, 2) if bed.small else (1024, 256, 8)))
    yield from around_attention(bed, t)
    yield from _attentions(bed)
    yield from _samples(bed)


SHARE_80 = ("share_of_copy", ">=", 0.80)
SHARE_75 = ("share_of_copy", ">=", 0.75)
ROUTER_US = ("time_us", "<=", 15.0)


# ---------------------------------------------------------------- rows of width d
def norms(bed: Bed, t: int, d: int) -> Iterator[Load]:
    m, weight_d = bed.kernels(), bed.upload(np.ones(d, np.float32))

    def plain():
        x_td, out_td = bed.normal((t, d), kind="fp32"), bed.empty((t, d), bed.t_dtype)
        return lambda: norm.norm(m, x_td, out_td, weight_d, eps=1e-5)

    def adding():
        x_td, out_td = bed.normal((t, d), kind="fp32"), bed.empty((t, d), bed.t_dtype)
        add_td = bed.normal((t, d), 1e-4)
        return lambda: norm.norm(m, x_td, out_td, weight_d, eps=1e-5, add_td=add_td)

    yield Load(f"norm {t} x {d}", plain, t * d * (4 + 2), goal=SHARE_80)
    yield Load(f"norm + residual {t} x {d}", adding, t * d * (4 + 4 + 2 + 2), goal=SHARE_80)


def moves(bed: Bed, t: int, d: int) -> Iterator[Load]:
    m, k, experts = bed.kernels(), 2, 16
    logit_te = np.random.default_rng(2).standard_normal((t, experts)).astype(np.float32)
    routed = _Routed(bed, logit_te, RouterConfig(experts, k))

    def permuting(fp8: bool):
        wide = (fp8_width(d), np.uint8) if fp8 else (d, bed.t_dtype)
        x_td, x_sd = bed.normal((t, d)), bed.empty((t * k, wide[0]), wide[1])
        slot_tk, n_send_e = bed.empty((t, k), np.int32), bed.empty((experts,), np.int32)
        return lambda: permute.permute(m, x_td, routed.expert_tk, routed.hist_be, slot_tk, x_sd, n_send_e, fp8=fp8)

    def unpacking():
        x_iw = bed.empty((t, fp8_width(d)), np.uint8)
        x_iw[...] = 0x38  # 1.0 in e4m3; as fp32 scale a small normal number
        out_id = bed.empty((t, d), bed.t_dtype)
        return lambda: permute.unpack_fp8(m, x_iw, out_id)

    def merging():
        x_td, y_sd = bed.normal((t, d), kind="fp32"), bed.normal((t * k, d), 1e-4)
        return lambda: merge.merge(m, x_td, y_sd, routed.weight_tk, slot_tk)

    def moving(function):
        source, out = bed.normal((t, d)), bed.empty((t, d), bed.t_dtype)
        index = bed.upload(np.random.default_rng(3).permutation(t).astype(np.int32))
        return lambda: function(m, source, index, out)

    yield Load(f"permute top-{k} {t} x {d}", lambda: permuting(False), t * d * 2 * (1 + k), goal=SHARE_80)
    yield Load(f"permute top-{k} to fp8 {t} x {d}", lambda: permuting(True), t * (d * 2 + k * fp8_width(d)))
    yield Load(f"unpack fp8 {t} x {d}", unpacking, t * (d * 2 + fp8_width(d)))
    slot_tk = bed.upload(np.random.default_rng(4).permutation(t * k).astype(np.int32).reshape(t, k))
    yield Load(f"merge top-{k} {t} x {d}", merging, t * d * (4 + 4 + 2 * k), goal=SHARE_80)
    yield Load(f"gather rows {t} x {d}", lambda: moving(rows.gather_rows), t * d * 4)
    yield Load(f"scatter rows {t} x {d}", lambda: moving(rows.scatter_rows), t * d * 4)


class _Routed:
    """What the router made of logits, on the device."""

    def __init__(self, bed: Bed, logit_te: np.ndarray, config: RouterConfig, bias_e=None):
        t, experts = logit_te.shape
        self.m, self.config, self.bias_e = bed.kernels(), config, bias_e
        self.logit_te = bed.upload(logit_te)
        self.expert_tk, self.weight_tk = (bed.empty((t, config.top_k), kind) for kind in (np.int32, np.float32))
        self.hist_be = bed.empty(router.histogram_shape(t, experts), np.int32)
        self()

    def __call__(self) -> None:
        router.router(self.m, self.logit_te, self.expert_tk, self.weight_tk, self.hist_be, config=self.config, bias_e=self.bias_e)


def routers(bed: Bed, t: int, experts: int, k: int) -> Iterator[Load]:
    groups, top_groups = (4, 2) if bed.small else (8, 4)
    logit_te = np.random.default_rng(5).standard_normal((t, experts)).astype(np.float32)
    bias_e = bed.upload(np.linspace(-0.1, 0.1, experts, dtype=np.float32))
    nbytes = t * experts * 4 + t * k * 8
    yield Load(f"router softmax top-{k} {t} x {experts}", lambda: _Routed(bed, logit_te, RouterConfig(experts, k)), nbytes,
               goal=ROUTER_US)
    grouped = RouterConfig(experts, k, "sigmoid", bias=True, groups=groups, top_groups=top_groups, scale=2.5)
    yield Load(f"router sigmoid, {top_groups} of {groups} groups {t} x {experts}", lambda: _Routed(bed, logit_te, grouped, bias_e),
               nbytes, goal=ROUTER_US)


# ---------------------------------------------------------------- attention and what is around it
def around_attention(bed: Bed, t: int) -> Iterator[Load]:
    m = bed.kernels()
    heads, kv_heads, c = (4, 2, 16) if bed.small else (32, 8, 128)
    d, f, vocab = (64, 48, 97) if bed.small else (4096, 8192, 32000)
    page_tokens, context = 64, 128
    slots = -(-t // context)
    page_sp = bed.upload(np.arange(slots * 2, dtype=np.int32).reshape(slots, 2))
    angle = np.arange(context)[:, None] * 10000.0 ** (-np.arange(c // 2) * 2.0 / c)
    cos_pc, sin_pc = bed.upload(np.cos(angle).astype(np.float32)), bed.upload(np.sin(angle).astype(np.float32))
    position_t = bed.upload((np.arange(t) % context).astype(np.int32))
    slot_t = bed.upload((np.arange(t) // context).astype(np.int32))
    token_t = bed.upload(np.random.default_rng(6).integers(0, vocab, t).astype(np.int32))
    width = (heads + 2 * kv_heads) * c

    def turning():
        qkv_tx, q_thc = bed.normal((t, width)), bed.empty((t, heads, c), bed.t_dtype)
        k_phoc, v_phoc = (bed.empty((slots * 2, kv_heads, page_tokens, c), bed.t_dtype) for _ in range(2))
        return lambda: rope.rope_kv(m, qkv_tx, q_thc, k_phoc, v_phoc, position_t, slot_t, page_sp, cos_pc, sin_pc, heads=heads,
                                    kv_heads=kv_heads, head_dim=c, page_tokens=page_tokens, scale=c**-0.5)

    def gating():
        both_if, out_if = bed.normal((t, 2 * f)), bed.empty((t, f), bed.t_dtype)
        return lambda: swiglu.swiglu(m, both_if, out_if, act="silu")

    def embedding():
        table_vd, x_td = bed.normal((vocab, d)), bed.empty((t, d), np.float32)
        return lambda: embed.embed(m, table_vd, token_t, x_td)

    yield Load(f"rope + KV append {t} rows, {heads}/{kv_heads} heads x {c}", turning, t * width * 4)
    yield Load(f"swiglu {t} x {f}", gating, t * f * 6)
    yield Load(f"embed {t} x {d}", embedding, t * d * 6)


def _attentions(bed: Bed) -> Iterator[Load]:
    for heads, kv_heads, c in ((4, 2, 16),) if bed.small else ((32, 8, 128), (40, 8, 128)):
        sequences, context = (3, 80) if bed.small else (64, 4096)
        yield decode(bed, (heads, kv_heads, c), sequences, context, SHARE_75)
    if not bed.small:
        yield decode(bed, (32, 8, 128), 4, 65536)
    yield prefill(bed, (4, 2, 16) if bed.small else (32, 8, 128), 2, 40 if bed.small else 4096)


def pages(bed: Bed, sequences: int, context: int, kv_heads: int, c: int):
    """(k, v, page_sp) of sequences whose pages lie scattered in the cache."""
    page_tokens = 64
    each = -(-context // page_tokens)
    page_sp = np.random.default_rng(7).permutation(sequences * each).astype(np.int32).reshape(sequences, each)
    k, v = (bed.normal((sequences * each, kv_heads, page_tokens, c)) for _ in range(2))
    return k, v, bed.upload(page_sp)


def decode(bed: Bed, shape, sequences: int, context: int, goal=None) -> Load:
    m, (heads, kv_heads, c) = bed.kernels(), shape
    slot_t = bed.upload(np.arange(sequences, dtype=np.int32))
    position_t = bed.upload(np.full(sequences, context - 1, np.int32))
    work = attention.Work(bed.upload(np.arange(sequences, dtype=np.int32)), None, bed.upload(np.empty((0, 4), np.int32)), None)
    splits = attention.splits(m, sequences, kv_heads, context)
    floats = attention.workspace_floats(sequences, heads, c, splits)

    def make():
        k_phoc, v_phoc, page_sp = pages(bed, sequences, context, kv_heads, c)
        q_thc, out_thc = bed.normal((sequences, heads, c), c**-0.5), bed.empty((sequences, heads, c), bed.t_dtype)
        workspace = bed.empty((max(1, floats),), np.float32)
        return lambda: attention.attention(m, q_thc, k_phoc, v_phoc, page_sp, slot_t, position_t, work, out_thc, splits=splits,
                                           workspace=workspace)

    return Load(f"decode attention {sequences} x {context}, {heads}/{kv_heads} heads x {c}", make,
                2 * 2 * sequences * context * kv_heads * c, 4.0 * sequences * context * heads * c, goal)


def prefill(bed: Bed, shape, sequences: int, length: int) -> Load:
    m, (heads, kv_heads, c) = bed.kernels(), shape
    t = sequences * length
    slot_t = bed.upload((np.arange(t) // length).astype(np.int32))
    position_t = bed.upload((np.arange(t) % length).astype(np.int32))
    slot_q = np.arange(sequences, dtype=np.int32)
    tile_w4 = attention.tiles_of(slot_q * length, np.full(sequences, length), slot_q, np.zeros(sequences, np.int64))
    work = attention.Work(bed.upload(np.empty(0, np.int32)), None, bed.upload(np.asarray(tile_w4, np.int32)), None)

    def make():
        k_phoc, v_phoc, page_sp = pages(bed, sequences, length, kv_heads, c)
        q_thc, out_thc = bed.normal((t, heads, c), c**-0.5), bed.empty((t, heads, c), bed.t_dtype)
        return lambda: attention.attention(m, q_thc, k_phoc, v_phoc, page_sp, slot_t, position_t, work, out_thc)

    return Load(f"prefill attention {sequences} x {length}, {heads}/{kv_heads} heads x {c}", make,
                t * c * 2 * (2 * heads + 2 * kv_heads), 2.0 * sequences * length * (length + 1) * heads * c)


# ---------------------------------------------------------------- sampling
def _samples(bed: Bed) -> Iterator[Load]:
    n, vocab = (3, 97) if bed.small else (1024, 32000)
    m = bed.kernels()

    def make(temperature: float):
        draw = sample.Draw(*(bed.upload(a) for a in draw_of(n, temperature)))
        logit_nv = bed.normal((n, vocab), 2.0, kind="fp32")
        token_n, logprob_n = bed.empty((n,), np.int32), bed.empty((n,), np.float64)
        return lambda: sample.sample(m, logit_nv, draw, token_n, logprob_n)

    yield Load(f"sample greedy {n} x {vocab}", lambda: make(0.0), n * vocab * 4)
    yield Load(f"sample top-k 50, top-p 0.9 {n} x {vocab}", lambda: make(0.8), n * vocab * 4)


def draw_of(n: int, temperature: float) -> tuple:
    """Fields of sample.Draw for n rows, on the host."""
    return (np.full(n, temperature), np.full(n, 50, np.int32), np.full(n, 0.9), np.full(n, 3, np.uint64),
            np.arange(n, dtype=np.uint64), np.full(n, 17, np.int64), np.full(n, -1, np.int32))
