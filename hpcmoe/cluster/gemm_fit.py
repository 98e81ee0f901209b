"""Fits the numbers of a GemmModel to a table of measured products."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field, replace
from typing import Callable, NamedTuple

import numpy as np

from hpcmoe.cluster.fit import FitError, least_squares, rounded
from hpcmoe.cluster.gemm import GemmModel, Tile
from hpcmoe.errors import UserError, at


class Products(NamedTuple):
    """Measured products: sizes int [i] each, and s [i]."""

    m: np.ndarray
    n: np.ndarray
    k: np.ndarray
    seconds: np.ndarray

    def where(self, keep: np.ndarray) -> Products:
        return Products(*(x[keep] for x in self))

    def held_out(self, sizes) -> np.ndarray:
        """bool [i]: n or k is one of the sizes."""
        return np.isin(self.n, sizes) | np.isin(self.k, sizes)


def read_products(path: str) -> Products:
    """The rows of a CSV file with columns m, n, k, latency_ms, or of what `hpcmoe bench gpu --only gemm` (or calibrate)
    `--out FILE.json` wrote.

    UserError with line and value where one is wrong.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = _bench_rows(path, file) if path.endswith(".json") else _csv_rows(path, file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not rows:
        raise UserError(f"{path}: no rows")
    m, n, k, ms = zip(*rows)
    return Products(np.array(m), np.array(n), np.array(k), np.array(ms) * 1e-3)


def measured_on(path: str) -> str:
    """The GPU that a file of bench gpu was measured on; "" of a CSV file, which does not say."""
    if not path.endswith(".json"):
        return ""
    with open(path, encoding="utf-8") as file:
        return str(json.load(file).get("device", {}).get("name", ""))


def _csv_rows(path: str, file) -> list[tuple]:
    reader = csv.DictReader(file)
    missing = {"m", "n", "k", "latency_ms"} - set(reader.fieldnames or [])
    if missing:
        raise UserError(f"{path}: no column {', '.join(sorted(missing))}: expected m, n, k, latency_ms")
    return [_row(f"{path}: line {line}", row) for line, row in enumerate(reader, 2)]


def _bench_rows(path: str, file) -> list[tuple]:
    try:
        sections = json.load(file)["sections"]
        points = (sections.get("gemm") or sections["calibrate"])["points"]["gemm"]
        found = [{**point, "latency_ms": point["time_ms"]} for point in points]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no products in it: expected what `hpcmoe bench gpu --only gemm --out FILE` writes") from error
    return [_row(f"{path}: gemm {i}", point) for i, point in enumerate(found)]


def _row(where: str, row: dict) -> tuple[int, int, int, float]:
    values = []
    for name, kind in (("m", int), ("n", int), ("k", int), ("latency_ms", float)):
        try:
            value = kind(row[name])
        except (TypeError, ValueError, KeyError):
            value = 0
        if not 0 < value < float("inf"):
            raise at(where, name, row.get(name), f"{'an integer' if kind is int else 'a number'} > 0")
        values.append(value)
    return tuple(values)


@dataclass(frozen=True)
class Chip:
    """What is not fitted: units, item_bytes; peaks, of all units: gflop_per_s and memory's gb_per_s, of which fractions
    are fitted; tiles (rows, columns), splits: what a library may choose from; fixed: other numbers of a GemmModel.
    start: where those that are fitted start."""

    units: int
    item_bytes: int
    gflop_per_s: float
    memory_gb_per_s: float
    tiles: tuple[tuple[int, int], ...]
    splits: tuple[int, ...]
    start: dict[str, float]
    fixed: dict[str, float] = field(default_factory=dict)


GPU_TILES = ((64, 64), (64, 128), (128, 128), (128, 256))  # of Hopper's GEMM kernels: 64 rows per warp group
GPU_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
HOPPER = 989.5e3  # GFLOP/s: NVIDIA H100 and H200 SXM datasheets: 1,979 TFLOP/s with sparsity, half of it dense
GPU_START = {"unit_gb_per_s": 80.0, "cache_gb_per_s": 9e3, "floor_us": 2.5, "wave_us": 0.5, "split_us": 0.9, "sharpness": 4.0,
             "hot_fraction": 0.1, "hot_us": 300.0}
CHIPS = {
    "h100_sxm": Chip(132, 2, HOPPER, 3350.0, GPU_TILES, GPU_SPLITS, GPU_START),  # 132 SMs, 3.35 TB/s: H100 SXM datasheet
    "h200_sxm": Chip(132, 2, HOPPER, 4800.0, GPU_TILES, GPU_SPLITS, GPU_START),  # 132 SMs, 4.8 TB/s: H200 SXM datasheet
}
FRACTION = 0.85  # of a peak, at the start


def fit(chip: Chip, rows: Products, tell: Callable[[int, float], None] = lambda i, e: None) -> GemmModel:
    """The model of the chip that is nearest to the rows."""
    start = np.concatenate([np.log(list(chip.start.values())), np.full(1 + len(chip.tiles), np.log(FRACTION / (1 - FRACTION)))])
    found = least_squares(lambda x: _model(chip, x).seconds(rows.m, rows.n, rows.k), start, rows.seconds, tell=tell)
    model = rounded(_model(chip, found))
    return replace(model, tile=tuple(map(rounded, model.tile)))


def _model(chip: Chip, x: np.ndarray) -> GemmModel:
    """Positive numbers by exp, fractions by the logistic function: every x is a sound model."""
    positive = dict(zip(chip.start, map(float, np.exp(x[:len(chip.start)]))))
    memory, *efficiency = (float(1 / (1 + np.exp(-v))) for v in x[len(chip.start):])
    tiles = tuple(Tile(*shape, e) for shape, e in zip(chip.tiles, efficiency))
    return GemmModel(units=chip.units, item_bytes=chip.item_bytes, unit_gflop_per_s=chip.gflop_per_s / chip.units,
                     memory_gb_per_s=memory * chip.memory_gb_per_s, splits=chip.splits, tile=tiles, **positive, **chip.fixed)


def error(model: GemmModel, rows: Products) -> FitError:
    return FitError.of(model.seconds(rows.m, rows.n, rows.k), rows.seconds)
