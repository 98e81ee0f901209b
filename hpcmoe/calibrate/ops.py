"""Measures a CPU rank's ops as a run makes them, and fits what they take besides products, attention and passes over rows.

Steps of made-up models go through the real compute/host.py, all layers one after the other, so that weights lie in caches or not as in
a run. Times are CPU times of the one thread, medians over layers and turns.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from typing import Callable, NamedTuple

import numpy as np

from hpcmoe import linear
from hpcmoe.cluster.fit import FitError, least_squares
from hpcmoe.cluster.kernels import Calibration, CallsModel
from hpcmoe.compute.base import Sizes
from hpcmoe.compute.holdings import Share
from hpcmoe.compute.host import Host
from hpcmoe.compute.step import SAMPLED, Batch, Choices, Work
from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig, RunJob, WeightsJob
from hpcmoe.data.create import create
from hpcmoe.data.weights import WeightsFile
from hpcmoe.model.attention import Segments
from hpcmoe.model.shard import Shard
from hpcmoe.parallel.batch import Batcher
from hpcmoe.products.packed import PackedLinear
from hpcmoe.simulate.durations import Durations
from hpcmoe.simulate.workload import Rows, rows_of

MODELS = (ModelConfig("mixtral", 2048, 192, 4, AttentionConfig(6, 2, 32), RouterConfig(16, 2), ExpertConfig(208), 512),
          ModelConfig("mixtral", 6144, 512, 2, AttentionConfig(8, 2, 64), RouterConfig(8, 2), ExpertConfig(768), 512))
STEPS = ((1, 32, 1), (4, 100, 1), (16, 32, 1), (48, 64, 1), (128, 32, 1), (1, 0, 16), (8, 0, 16), (4, 64, 64))  # sequences, tokens before, new ones
TURNS = 8
KINDS = ("begin", "attend", "gate", "dispatch", "expert", "merge", "sample", "draw", "step")


class Timed(NamedTuple):
    """An op of one step of one model: its kind, the step's rows, rows of each expert where experts are meant, s."""

    model: ModelConfig
    kind: str
    rows: Rows
    rows_e: tuple[int, ...]
    seconds: float


class _Stopwatch:
    """CPU seconds of this thread by kind of op."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, kind: str, work: Callable):
        start = time.thread_time()
        result = work()
        self.seconds.setdefault(kind, []).append(time.thread_time() - start)
        return result


def measure_ops(backend: str, dtype: str, tell: Callable[[str], None]) -> list[Timed]:
    """Every kind of op in every step of every model."""
    found = []
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.h5")
            create(path, model, "fp32", 1)
            host = Host(WeightsJob(file=path, backend=backend, dtype=dtype))
            share = Share(list(range(model.layers)), list(range(model.router.experts)), True, True, True, Shard.of(model, 0, 1))
            with WeightsFile(path) as file:
                held = host.load(file, model, share, model.context)
        for step in STEPS:
            for temperature in (0.0, 0.8) if step[2] == 1 else (0.0,):
                found += _step(host, held, share, model, step, temperature)
        tell(f"ops of a model of d = {model.d}, f = {model.expert.f}: {len(STEPS)} steps")
    return found


def _step(host: Host, held, share: Share, model: ModelConfig, step: tuple[int, int, int], temperature: float) -> list[Timed]:
    """The ops of one step; with a temperature the choice of tokens alone, which are drawn."""
    sequences, start, count = step
    sizes = Sizes(1, 1, sequences, sequences * count, model.context, 0, 0, sequences * count * model.router.top_k)
    works = [Work(i, np.zeros(start + count, np.int64), 8, temperature, 0, 0.95, 1, (), False) for i in range(sequences)]
    compute = host.compute(model, held, sizes, share, Choices.of(works, sequences), RunJob())
    compute.open_cache(sizes)
    segments = Segments.of(np.arange(sequences), np.full(sequences, start), np.full(sequences, count))
    batch = Batch(True, 0, segments, np.full(sequences, SAMPLED), np.arange(sequences), np.zeros(sequences, int), np.zeros(0, int))
    token_t = np.random.default_rng(0).integers(0, model.vocab, sequences * count)
    watch, chosen_e = _Stopwatch(), None
    for turn in range(1 + TURNS):
        if turn == 1:
            watch.seconds.clear()  # the first one warms up
        _batch(watch, works, sizes, sequences)
        watch("begin", lambda: compute.begin(0, batch, token_t))
        for layer in range(model.layers):
            watch("attend", lambda: compute.attend(0, layer))
            chosen_e, = watch("gate", lambda: compute.gate(0, layer)).read()
            x_sd = watch("dispatch", lambda: compute.outgoing(0))
            y_sd = watch("expert", lambda: compute.expert(0, layer, x_sd, chosen_e[None].astype(np.int64)))
            watch("merge", lambda: compute.merge(0, y_sd))
        watch("draw" if temperature else "sample", lambda: compute.next_tokens(0))
    kinds = ("draw",) if temperature else [kind for kind in watch.seconds]
    return [Timed(model, kind, rows_of(batch, 0), tuple(chosen_e.tolist()), float(np.median(watch.seconds[kind]))) for kind in kinds]


def _batch(watch: _Stopwatch, works: list[Work], sizes: Sizes, sequences: int) -> None:
    """A step is put together, and its tokens are taken."""
    batcher = Batcher(works, 1, sizes.slots, sizes.slots * 512, 512, False, time.monotonic)
    batcher.build(0)
    batcher.accept(0, np.ones(sequences, np.int64), np.zeros(sequences))

    def work() -> None:
        batcher.build(0)
        batcher.accept(0, np.ones(sequences, np.int64), np.zeros(sequences))
    watch("step", work)


# ---------------------------------------------------------------- numbers of rows that are new
PLAN_ROWS = (1, 2, 3, 5, 9, 13, 17, 23, 31, 40, 48, 57, 65, 77)
PLAN_SHAPES = ((328, 192), (200, 192), (2056, 192), (1032, 512))  # (n, k); as experts' below, not those of MODELS, whose plans are there


def measure_plans(backend_name: str, dtype: str) -> tuple[float, float, int]:
    """(us that the first call with a number of rows takes more than later ones, medians: of a product, of an expert; rows of one call at
    most, 0 for no limit)."""
    backend = linear.choose(backend_name, dtype)
    products = [backend.linear(np.ones(shape, np.float32)) for shape in PLAN_SHAPES]
    experts = []
    for model in MODELS:
        gate_fd, down_df = (np.ones(shape, np.float32) for shape in ((model.expert.f + 8, model.d), (model.d, model.expert.f + 8)))
        experts.append(backend.expert(gate_fd, gate_fd, down_df))
    product_us, expert_us = (max(0.0, float(np.median([_first_s(product, m) for product in some for m in PLAN_ROWS]))) * 1e6 for some in (products, experts))
    return product_us, expert_us, products[0].weight.slab if isinstance(products[0], PackedLinear) else 0


def _first_s(product, rows: int) -> float:
    x_mk, seconds = np.ones((rows, product.k), np.float32), []
    for _ in range(5):
        start = time.thread_time()
        product(x_mk)
        seconds.append(time.thread_time() - start)
    return seconds[0] - float(np.median(seconds[1:]))


# ---------------------------------------------------------------- fit
FEATURES = {"draw": ("draw_us", "draw_ns"), "expert": ("expert_us", "expert_one_us", "expert_row_us")}
START_US = 5.0


def fit_calls(c: Calibration, timed: list[Timed], others: CallsModel = CallsModel()) -> CallsModel:
    """What makes Durations of this calibration nearest to the ops; others: with the numbers that are not fitted to these."""
    values: dict[str, float] = {}
    for kind in KINDS:
        rows = [one for one in timed if one.kind == kind]
        names = FEATURES.get(kind, (f"{kind}_us", f"{kind}_row_us"))
        now = replace(c, calls=CallsModel(**values))
        base = op_seconds(now, rows)
        unit = np.stack([op_seconds(replace(c, calls=CallsModel(**{**values, name: 1.0})), rows) - base for name in names])  # linear in each
        measured = np.array([one.seconds for one in rows])
        x = least_squares(lambda x: base + np.exp(x) @ unit, np.log(np.full(len(names), START_US)), measured)
        values |= {name: float(f"{v:.4g}") for name, v in zip(names, np.exp(x))}
    return replace(others, **values)


def op_seconds(c: Calibration, timed: list[Timed]) -> np.ndarray:
    """What a calibration says of the ops, s: [i]."""
    made = {id(one.model): Durations(c, one.model, one.model, False, False, False, float(one.kind == "draw")) for one in timed}
    return np.array([_seconds(made[id(one.model)], one) for one in timed])


def _seconds(durations: Durations, one: Timed) -> float:
    if one.kind == "expert":
        return durations.expert(one.rows_e).host_s
    if one.kind in ("draw", "sample"):
        return durations.sample(one.rows, 1).host_s
    return getattr(durations, one.kind)(one.rows).host_s


def errors(c: Calibration, timed: list[Timed]) -> dict[str, FitError]:
    """By kind of op."""
    return {kind: FitError.of(op_seconds(c, rows), np.array([one.seconds for one in rows]))
            for kind in KINDS for rows in [[one for one in timed if one.kind == kind]]}
