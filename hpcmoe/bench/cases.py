"""Random cases of every kernel, each with what its outputs must be close to: those of its NumPy twin.

A case is run on the device and on the host from the same arrays; then the arrays that the kernel
writes are compared. Router logits lie on a coarse grid, so that choices hang on ties alone, whose
order is defined, and not on the last bit of an exponential.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Iterator

import numpy as np

from hpcmoe.config import RouterConfig
from hpcmoe.kernels import attention, embed, merge, norm, permute, rope, router, rows, sample, shards, swiglu
from hpcmoe.kernels.e4m3 import fp8_width
from hpcmoe.model.copies import Copies, in_order
from hpcmoe.model.dtypes import from_fp32, to_fp32

ULP = {"fp16": 2.0**-10, "bf16": 2.0**-7}   # one unit in the last place over the value, at most
EXACT = 0.0


@dataclass
class Case:
    """One call. args: by name, in the order of the launcher; options: its keyword arguments.

    out: name of an output -> largest difference allowed, EXACT, or relative to the larger of the
    value and `floor` (1e-3 of the largest value unless given).
    """

    name: str
    launch: Callable
    twin: Callable
    args: dict
    out: dict[str, float]
    options: dict = field(default_factory=dict)
    floor: float = 1e-3


def run(m, case: Case, upload: Callable, download: Callable) -> str:
    """"" where the kernel's outputs agree with the twin's, else what differs.

    upload makes a device array of a host array, download a host array of a device array.
    """
    here, there = _copy(case.args), map_arrays(_copy(case.args), upload)
    options = _copy(case.options)
    case.twin(*here.values(), **options)
    case.launch(m, *there.values(), **map_arrays(_copy(case.options), upload))
    faults = [differ(name, download(there[name]), here[name], m.dtype, bound, case.floor) for name, bound in case.out.items()]
    return "; ".join(fault for fault in faults if fault)


def differ(name: str, got, want, dtype: str, bound: float, floor: float = 1e-3) -> str:
    """"" where two arrays agree, else where and how much they do not. uint16 arrays of kernels for bf16 hold its bits."""
    if bound == EXACT:
        wrong = got != want
        if got.dtype.kind == "f":
            wrong &= ~(np.isnan(got) & np.isnan(want))
    else:
        got, want = (to_fp32(a).astype(np.float64) if a.dtype.itemsize == 2 else a.astype(np.float64) for a in (got, want))
        finite = np.isfinite(want)
        size = np.maximum(np.abs(want), floor * (np.abs(want[finite]).max() if finite.any() else 0.0))
        with np.errstate(invalid="ignore"):
            close = finite & (np.abs(got - want) <= bound * size)
        wrong = ~(close | (got == want) | (np.isnan(got) & np.isnan(want)))
    if not wrong.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"{name}: {int(wrong.sum())} of {wrong.size} differ from the twin, first at {list(at)}: {got[at]} instead of {want[at]}"


def _copy(value):
    return map_arrays(value, np.copy)


def map_arrays(value, func):
    """func over every array in dicts and (named) tuples; all else as it is."""
    if isinstance(value, np.ndarray):
        return func(value)
    if isinstance(value, dict):
        return {k: map_arrays(v, func) for k, v in value.items()}
    if isinstance(value, tuple):
        inside = [map_arrays(v, func) for v in value]
        return type(value)(*inside) if hasattr(value, "_fields") else tuple(inside)
    return value


# ---------------------------------------------------------------- the cases
class Maker:
    """Random arrays for the cases of one 16-bit type. small: tiny sizes, for kernels on the CPU."""

    def __init__(self, dtype: str, seed: int, small: bool):
        self.dtype, self.small = dtype, small
        self.rng = np.random.default_rng(seed)
        self.ulp = ULP[dtype]

    def fp32(self, *shape, scale: float = 1.0) -> np.ndarray:
        return (self.rng.standard_normal(shape) * scale).astype(np.float32)

    def t(self, *shape, scale: float = 1.0) -> np.ndarray:
        return from_fp32(self.fp32(*shape, scale=scale), self.dtype)

    def none(self, *shape) -> np.ndarray:
        """An output of the 16-bit type, filled with a value that no result has."""
        return from_fp32(np.full(shape, 7.5, np.float32), self.dtype)

    def permutation(self, count: int) -> np.ndarray:
        return self.rng.permutation(count).astype(np.int32)


def cases(dtype: str, seed: int = 0, small: bool = False) -> Iterator[Case]:
    """All cases for one 16-bit type; the same for the same seed."""
    make = Maker(dtype, seed, small)
    for group in (_norms, _ropes, _elements, _routers, _moves, _attentions, _samples):
        yield from group(make)


def _norms(make: Maker) -> Iterator[Case]:
    for t, d, kind in ((1, 8, "rms"), (3, 33, "layer")) if make.small else ((1, 8, "rms"), (67, 33, "layer"), (512, 5120, "rms"),
                                                                         (64, 8192, "rms"), (9, 9000, "layer")):
        count = np.array([max(1, t - 2)], np.int32)
        bias_d = make.fp32(d) if kind == "layer" else None
        args = {"x_td": make.fp32(t, d), "out_td": make.none(t, d), "weight_d": make.fp32(d)}
        yield Case(f"norm {kind} {t} x {d}", norm.norm, norm.norm_twin, args, {"out_td": make.ulp},
                   {"eps": 1e-5, "kind": kind, "bias_d": bias_d, "rows": count})
        args = {"x_td": make.fp32(t, d), "out_td": make.none(t, d), "weight_d": make.fp32(d)}
        yield Case(f"norm {kind} + residual {t} x {d}", norm.norm, norm.norm_twin, args, {"out_td": make.ulp, "x_td": EXACT},
                   {"eps": 1e-5, "kind": kind, "bias_d": bias_d, "add_td": make.t(t, d), "add_bias_d": None})


def _ropes(make: Maker) -> Iterator[Case]:
    for t, heads, kv_heads, c, norms in ((5, 4, 2, 16, "none"),) if make.small else (
            (37, 4, 2, 16, "full"), (256, 32, 8, 128, "none"), (130, 40, 8, 128, "head")):
        context, page_tokens, slots = 32, 16, 3
        widths = {"none": (0, 0), "head": (c, c), "full": (heads * c, kv_heads * c)}[norms]
        page_sp = make.permutation(slots * 2).reshape(slots, 2)
        place = make.rng.permutation(slots * context) if t <= slots * context else np.arange(t)  # no two rows at one place
        slots_wanted = int(place[:t].max()) // context + 1
        if slots_wanted > slots:
            page_sp = make.permutation(slots_wanted * 2).reshape(slots_wanted, 2)
        pages = (page_sp.size, kv_heads, page_tokens, c)
        angle = np.arange(context)[:, None] * 10000.0 ** (-np.arange(c // 2) * 2.0 / c)
        args = {"qkv_tx": make.t(t, (heads + 2 * kv_heads) * c), "q_thc": make.none(t, heads, c), "k_phoc": make.none(*pages),
                "v_phoc": make.none(*pages), "position_t": (place[:t] % context).astype(np.int32),
                "slot_t": (place[:t] // context).astype(np.int32), "page_sp": page_sp,
                "cos_pc": np.cos(angle).astype(np.float32), "sin_pc": np.sin(angle).astype(np.float32)}
        options = {"heads": heads, "kv_heads": kv_heads, "head_dim": c, "page_tokens": page_tokens, "scale": float(c**-0.5),
                   "qk_norm": norms, "eps": 1e-6}
        if norms != "none":
            options |= {"q_norm": make.fp32(widths[0]), "k_norm": make.fp32(widths[1])}
        yield Case(f"rope {t} rows {heads}/{kv_heads} x {c}, norm {norms}", rope.rope_kv, rope.rope_kv_twin, args,
                   {"q_thc": 2 * make.ulp, "k_phoc": 2 * make.ulp, "v_phoc": EXACT}, options)


def _elements(make: Maker) -> Iterator[Case]:
    for t, d in ((3, 17), (4, 64)) if make.small else ((1, 8), (129, 33), (700, 5120)):
        args = {"table_vd": make.t(50, d), "token_t": make.rng.integers(0, 50, t).astype(np.int32), "x_td": make.fp32(t, d)}
        yield Case(f"embed {t} x {d}", embed.embed, embed.embed_twin, args, {"x_td": EXACT}, {"first_id": 10})
        args = {"parts_jtd": make.t(3, t, d), "out_td": make.none(t, d)}
        yield Case(f"sum of 3 shards {t} x {d}", shards.sum_parts, shards.sum_parts_twin, args, {"out_td": EXACT})
        yield Case(f"narrow {t} x {d}", shards.narrow, shards.narrow_twin, {"x_td": make.fp32(t, d), "out_td": make.none(t, d)},
                   {"out_td": EXACT})
        yield Case(f"add rows {t} x {d}", shards.add_rows, shards.add_rows_twin, {"y_td": make.t(t, d), "x_td": make.fp32(t, d)},
                   {"x_td": EXACT})
        for act in ("silu", "gelu", "gelu_tanh", "relu"):
            args = {"both_if": make.t(t, 2 * d, scale=3.0), "out_if": make.none(t, d)}
            yield Case(f"swiglu {act} {t} x {d}", swiglu.swiglu, swiglu.swiglu_twin, args, {"out_if": make.ulp},
                       {"act": act, "rows": np.array([max(1, t - 1)], np.int32)})
        args = {"source_id": make.t(t, d), "index_i": make.permutation(t), "out_id": make.none(t, d)}
        yield Case(f"gather rows {t} x {d}", rows.gather_rows, rows.gather_rows_twin, args, {"out_id": EXACT})
        yield Case(f"scatter rows {t} x {d}", rows.scatter_rows, rows.scatter_rows_twin, args, {"out_id": EXACT})


ROUTERS = (RouterConfig(5, 1), RouterConfig(16, 2, renormalise=False), RouterConfig(16, 2, over="selected"),
           RouterConfig(16, 2, "sparsemixer", jitter=0.01), RouterConfig(256, 8, "sigmoid", bias=True, groups=8, top_groups=4,
                                                                       scale=2.5), RouterConfig(512, 8))


def _routers(make: Maker) -> Iterator[Case]:
    for config in ROUTERS[:4] if make.small else ROUTERS:
        for t in (7,) if make.small else (1, 33, 1024):
            logit_te = (make.rng.integers(-96, 96, (t, config.experts)) / 32).astype(np.float32)
            args = {"logit_te": logit_te, "expert_tk": np.full((t, config.top_k), -1, np.int32),
                    "weight_tk": np.zeros((t, config.top_k), np.float32),
                    "hist_be": np.full(router.histogram_shape(t, config.experts), -1, np.int32)}
            bias_e = (make.rng.integers(-8, 8, config.experts) / 4).astype(np.float32) if config.bias else None
            yield Case(f"router {config.score} {t} x {config.experts} top-{config.top_k}", router.router, router.router_twin, args,
                       {"expert_tk": EXACT, "weight_tk": 2e-6, "hist_be": EXACT},
                       {"config": config, "bias_e": bias_e, "rows": np.array([max(1, t - 1)], np.int32)})


def _moves(make: Maker) -> Iterator[Case]:
    for t, k, experts, d in ((5, 2, 5, 24), (3, 1, 16, 9)) if make.small else ((1, 1, 5, 8), (257, 2, 16, 100), (1024, 8, 256, 512),
                                                                            (300, 6, 512, 2048)):
        expert_tk, hist_be = _routed(make, t, experts, k)
        base = {"expert_tk": expert_tk, "hist_be": hist_be, "slot_tk": np.full((t, k), -1, np.int32)}
        totals = np.full(experts, -1, np.int32)
        args = {"x_td": make.t(t, d), **base, "x_sd": make.none(t * k, d), "n_send_e": totals}
        out = {"slot_tk": EXACT, "x_sd": EXACT, "n_send_e": EXACT}
        yield Case(f"permute {t} x {d} top-{k} of {experts}", permute.permute, permute.permute_twin, args, out)
        copies = Copies(make.rng.permutation(in_order(experts, min(512, experts * 5 // 4))), experts)
        spread = {**args, "n_send_e": np.full(len(copies.expert_s), -1, np.int32)}
        yield Case(f"permute to copies {t} x {d} top-{k} of {experts}", permute.permute, permute.permute_twin, spread, out,
                   {"turns": copies.turns(3)})
        wide = fp8_width(d)
        args = {**args, "x_sd": np.zeros((t * k, wide), np.uint8)}
        yield Case(f"permute to fp8 {t} x {d} top-{k} of {experts}", permute.permute, permute.permute_twin, args, out, {"fp8": True})
        packed = np.zeros((t * k, wide), np.uint8)
        permute.permute_twin(args["x_td"], expert_tk, hist_be, np.empty((t, k), np.int32), packed, np.empty(experts, np.int32), fp8=True)
        yield Case(f"unpack fp8 {t * k} x {d}", permute.unpack_fp8, permute.unpack_fp8_twin,
                   {"x_iw": packed, "out_id": make.none(t * k, d)}, {"out_id": make.ulp})
        args = {"x_td": make.fp32(t, d), "y_sd": make.t(t * k, d), "weight_tk": make.fp32(t, k),
                "slot_tk": make.permutation(t * k).reshape(t, k)}
        yield Case(f"merge {t} x {d} top-{k}", merge.merge, merge.merge_twin, args, {"x_td": 2e-6},
                   floor=0.25)  # terms cancel, and a GPU multiplies and adds with one rounding


def _routed(make: Maker, t: int, experts: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(expert_tk, hist_be) of random logits, by the router's twin."""
    expert_tk, weight_tk = np.empty((t, k), np.int32), np.empty((t, k), np.float32)
    hist_be = np.empty(router.histogram_shape(t, experts), np.int32)
    router.router_twin(make.fp32(t, experts), expert_tk, weight_tk, hist_be, config=RouterConfig(experts, k))
    return expert_tk, hist_be


def _attentions(make: Maker) -> Iterator[Case]:
    for heads, kv_heads, c, window in ((4, 2, 16, 0),) if make.small else ((4, 4, 16, 0), (32, 8, 128, 0), (40, 8, 128, 100),
                                                                           (8, 1, 256, 0), (6, 2, 80, 33)):
        count_q = np.array([1, 3, 1] if make.small else [1, 100, 1, 1, 37, 1])
        start_q = np.array([20, 9, 0] if make.small else [500, 0, 0, 1023, 250, 64])
        yield _attention(make, (heads, kv_heads, c, window), count_q, start_q)


def _attention(make: Maker, shape, count_q, start_q) -> Case:
    """Segments of several sequences in one call: single rows and chunks, split over keys where that is usual."""
    heads, kv_heads, c, window = shape
    page_tokens, slots = 16, len(count_q)
    first_q, t = np.cumsum(count_q) - count_q, int(count_q.sum())
    longest = int((start_q + count_q).max())
    each = -(-longest // page_tokens)
    slot_q = make.rng.permutation(slots)
    pages = (slots * each, kv_heads, page_tokens, c)
    decode_b = first_q[count_q == 1].astype(np.int32)
    many = count_q > 1
    tile_w4 = attention.tiles_of(first_q[many], count_q[many], slot_q[many], start_q[many])
    work = attention.Work(decode_b, np.array([len(decode_b)], np.int32), np.asarray(tile_w4, np.int32), np.array([len(tile_w4)], np.int32))
    splits = 3
    args = {"q_thc": make.t(t, heads, c, scale=c**-0.5), "k_phoc": make.t(*pages), "v_phoc": make.t(*pages),
            "page_sp": make.permutation(slots * each).reshape(slots, each), "slot_t": np.repeat(slot_q, count_q).astype(np.int32),
            "position_t": (np.arange(t) + np.repeat(start_q - first_q, count_q)).astype(np.int32), "work": work,
            "out_thc": make.none(t, heads, c)}
    floats = max(1, attention.workspace_floats(len(decode_b), heads, c, splits))
    return Case(f"attention {t} rows {heads}/{kv_heads} x {c}, window {window}", attention.attention, attention.attention_twin, args,
                {"out_thc": 4 * make.ulp}, {"window": window, "splits": splits, "workspace": np.zeros(floats, np.float32)}, floor=0.25)


def _samples(make: Maker) -> Iterator[Case]:
    for n, vocab in ((4, 97),) if make.small else ((1, 8), (64, 2048), (16, 32000), (5, 151936)):
        draw = sample.Draw(np.where(np.arange(n) % 3 == 0, 0.0, 0.7), (np.arange(n) % 4 * 7).astype(np.int32),
                           np.where(np.arange(n) % 2 == 0, 1.0, 0.9), np.arange(n, dtype=np.uint64) + 5, np.arange(n, dtype=np.uint64),
                           np.arange(n, dtype=np.int64) + 11, np.where(np.arange(n) % 5 == 4, 1, -1).astype(np.int32))
        args = {"logit_nv": make.fp32(n, vocab, scale=2.0), "draw": draw, "token_n": np.full(n, -1, np.int32),
                "logprob_n": np.zeros(n, np.float64)}
        yield Case(f"sample {n} x {vocab}", sample.sample, sample.sample_twin, args, {"token_n": EXACT, "logprob_n": 1e-6})
