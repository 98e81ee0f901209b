"""Measures this machine's CPU with the products and the attention that a run uses, and fits a calibration to it.

Times are CPU times of the one thread that computes, the least of a few: what a kernel takes when the core is its own,
also while other programs run. Weights, keys and values come from memory, as in a run: between two calls so many other
bytes are read that the caches of a core do not hold them.
"""

from __future__ import annotations

import time
from typing import Callable, NamedTuple

import numpy as np

from hpcmoe import linear, memory
from hpcmoe.cluster.fit import FitError, least_squares
from hpcmoe.cluster.gemm import GemmModel
from hpcmoe.cluster.gemm_fit import Chip, Products, error, fit
from hpcmoe.cluster.kernels import AttentionModel, Calibration, ElementwiseModel, HostModel
from hpcmoe.errors import UserError
from hpcmoe.model.attention import Segments, attend
from hpcmoe.model.dense import Norm

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SHAPES = ((208, 192), (192, 208), (1024, 256), (256, 1024), (1024, 1024), (3584, 1024), (1024, 3584), (2048, 2048))  # (n, k): fitted
HELD_OUT = ((512, 512), (1536, 768), (768, 1536), (3072, 1536))
COLD_BYTES = 48 << 20    # copies of a weight fill so much
CPU_TILES = ((1, 64), (4, 64), (16, 64), (64, 64))
CPU_START = {"cache_gb_per_s": 50.0, "floor_us": 3.0, "wave_us": 0.2, "sharpness": 3.0}
CPU_FIXED = {"unit_gb_per_s": 1e6, "split_us": 0.0, "hot_fraction": 0.0, "hot_us": 1.0}  # of one core: nothing apart from the rest
HEADS, KV_HEADS = 8, 2
ATTENTION = (  # (sequences, tokens of each in the cache, new ones): chunks of prompts, and single rows
    *((sequences, start, count) for sequences in (1, 4) for count in (16, 64, 256) for start in (0, 300, 768)),
    *((sequences, start, 1) for sequences in (1, 8, 32, 64) for start in (32, 128, 512, 1000)))
ELEMENTWISE = ((1, 256), (16, 256), (64, 1024), (256, 1024), (1024, 1024), (1024, 4096))  # rows, width of a norm


class Attended(NamedTuple):
    """One measured call of attention: `sequences` sequences with `start` tokens in the cache and `count` new ones each."""

    sequences: int
    start: int
    count: int
    head_dim: int
    seconds: float


def least_s(work: Callable[[], object], before: Callable[[], object] = lambda: None, least_runs: int = 4, seconds: float = 0.03) -> float:
    """CPU seconds of this thread for one call: the least of at least so many, and of as many as fit in the time; `before`
    is called before each, and does not count."""
    best, begin, runs = np.inf, time.thread_time(), 0
    while runs < least_runs or (time.thread_time() - begin < seconds and runs < 200):
        before()
        start = time.thread_time()
        work()
        best, runs = min(best, time.thread_time() - start), runs + 1
    return best


# ---------------------------------------------------------------- products
def measure_products(backend, shapes, tell: Callable[[str], None]) -> Products:
    """Every shape at every number of rows, with weights that no cache holds."""
    found = []
    for n, k in shapes:
        copies = max(2, COLD_BYTES // (4 * n * k))
        weight_nk = np.random.default_rng(0).standard_normal((n, k), dtype=np.float32)
        products = [backend.linear(weight_nk) for _ in range(copies)]
        x_mk, y_mn = np.ones((max(ROWS), k), np.float32), np.empty((max(ROWS), n), np.float32)
        turn = 0
        for m in ROWS:
            def work() -> None:
                nonlocal turn
                turn = (turn + 1) % copies
                products[turn](x_mk[:m], out=y_mn[:m])

            found.append((m, n, k, least_s(work)))
        tell(f"products {n} x {k}: {2e-9 * max(ROWS) * n * k / found[-1][3]:.0f} GFLOP/s at {max(ROWS)} rows")
    m, n, k, s = (np.array(x) for x in zip(*found))
    return Products(m, n, k, s)


def cpu_chip(rows: Products, item_bytes: int) -> Chip:
    """One core: peaks a quarter above the best that was measured, of which the fit takes fractions."""
    flop_per_s = float((2.0 * rows.m * rows.n * rows.k / rows.seconds).max())
    single = rows.where(rows.m == 1)
    bytes_per_s = float((item_bytes * single.n * single.k / single.seconds).max())
    return Chip(1, item_bytes, 1.25e-9 * flop_per_s, 1.25e-9 * bytes_per_s, CPU_TILES, (1,), CPU_START, CPU_FIXED)


# ---------------------------------------------------------------- attention, passes over rows
def measure_attention() -> list[Attended]:
    """Chunks of prompts, and single rows of several sequences, with HEADS query heads on KV_HEADS."""
    found, rng, other = [], np.random.default_rng(0), np.ones(COLD_BYTES // 4, np.float32)
    for head_dim in (32, 128):
        slots, context = max(q for q, _, _ in ATTENTION), max(start + count for _, start, count in ATTENTION)
        k_shpc, v_shpc = rng.standard_normal((2, slots, KV_HEADS, context, head_dim), dtype=np.float32)
        for sequences, start, count in ATTENTION:
            segments = Segments.of(np.arange(sequences), np.full(sequences, start), np.full(sequences, count))
            q_thc = rng.standard_normal((sequences * count, HEADS, head_dim), dtype=np.float32)
            seconds = least_s(lambda: attend(q_thc, segments, k_shpc, v_shpc), before=other.sum)
            found.append(Attended(sequences, start, count, head_dim, seconds))
    return found


ATTENTION_START = (50.0, 20.0, 10.0, 1.0, 10.0, 10.0, 1.0)  # of AttentionModel's numbers but chunk_part: this attention masks


def fit_attention(gemm: GemmModel, rows: list[Attended]) -> AttentionModel:
    """The model nearest to the rows."""
    def model(x) -> AttentionModel:
        prefill, decode, kv, score, *us = (float(f"{v:.4g}") for v in np.exp(x))
        return AttentionModel(prefill, decode, kv, score, 1.0, *us)

    measured = np.array([row.seconds for row in rows])
    return model(least_squares(lambda x: attention_s(gemm, model(x), rows), np.log(ATTENTION_START), measured))


def attention_s(gemm: GemmModel, model: AttentionModel, rows: list[Attended]) -> np.ndarray:
    """What a calibration with this model says of the rows, s: [i]."""
    c = Calibration("", "", gemm, model, ElementwiseModel(1.0, 0.0), HostModel(0.0, 0.0))
    return np.array([float(c.decode_s(q * (start + 1), q, HEADS, KV_HEADS, hd)) if count == 1 else
                     c.prefill_s(np.full(q, start), np.full(q, count), HEADS, KV_HEADS, hd) for q, start, count, hd, _ in rows])


def measure_elementwise() -> tuple[np.ndarray, np.ndarray]:
    """(bytes read and written, s) of norms over rows: [i] each."""
    found = []
    for t, d in ELEMENTWISE:
        x_td, norm = np.ones((t, d), np.float32), Norm("rms", 1e-5, np.ones(d, np.float32))
        found.append((2 * x_td.nbytes, least_s(lambda: norm(x_td))))
    nbytes, seconds = (np.array(x) for x in zip(*found))
    return nbytes, seconds


def fit_elementwise(nbytes: np.ndarray, seconds: np.ndarray) -> ElementwiseModel:
    x = least_squares(lambda x: np.exp(x[1]) * 1e-6 + nbytes / (np.exp(x[0]) * 1e9), np.log([2.0, 10.0]), seconds)
    return ElementwiseModel(*(float(f"{v:.4g}") for v in np.exp(x)))


# ---------------------------------------------------------------- all of it
class Measured(NamedTuple):
    """A calibration of this machine, and its errors on what was fitted and on what was held out, by title."""

    calibration: Calibration
    errors: dict[str, FitError]


def measure(machine: str, source: str, backend_name: str, dtype: str, tell: Callable[[str], None]) -> Measured:
    """Measures and fits, in about half a minute on a free core. UserError where products use several threads."""
    memory.keep_freed()  # as a run does
    backend = linear.choose(backend_name, dtype)
    if backend.threads != 1:
        raise UserError(f"products use {backend.threads} threads: what one core takes is measured; expected OMP_NUM_THREADS=1 and "
                        "OPENBLAS_NUM_THREADS=1")
    tell(f"products by {backend.name} {backend.version}, {backend.dtype}")
    fitted, held = measure_products(backend, SHAPES, tell), measure_products(backend, HELD_OUT, tell)
    gemm = fit(cpu_chip(fitted, 2 if backend.dtype == "bf16" else 4), fitted)
    rows = measure_attention()
    tell(f"attention: {len(rows)} cases")
    apart, kept = rows[1::5], [row for i, row in enumerate(rows) if i % 5 != 1]
    attention = fit_attention(gemm, kept)
    nbytes, seconds = measure_elementwise()
    elementwise = fit_elementwise(nbytes, seconds)
    tell(f"passes over rows: {len(nbytes)} cases")
    made = Calibration(machine, f"{source}; products by {backend.name} {backend.version}, {backend.dtype}", gemm, attention, elementwise,
                       HostModel(0.0, 0.0))
    return Measured(made, {
        "products, fitted": error(gemm, fitted), "products, held out": error(gemm, held),
        "attention, fitted": _attention_error(gemm, attention, kept), "attention, held out": _attention_error(gemm, attention, apart),
        "passes, fitted": FitError.of(made.elementwise_s(nbytes), seconds)})


def _attention_error(gemm: GemmModel, model: AttentionModel, rows: list[Attended]) -> FitError:
    return FitError.of(attention_s(gemm, model, rows), np.array([row.seconds for row in rows]))
