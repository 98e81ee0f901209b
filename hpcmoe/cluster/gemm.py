"""The time of a dense product y[m, n] = x[m, k] W[k, n] on a machine of many equal units (SMs of a GPU, cores).

A library cuts y into tiles, and the sum over k into splits; units take tiles in waves. For one tile shape a x b and
s splits:

    tiles   = ceil(m / a) ceil(n / b) s,   waves = ceil(tiles / units)
    compute = waves (2 a b (k / s) / (efficiency_ab * peak of a unit) + wave)
    compute = compute (1 + hot * compute / (compute + hot time))              clocks fall under load
    memory  = bytes of x, W and y / bandwidth
    unit    = waves * bytes that a tile reads / bandwidth of a unit
    cache   = bytes that all tiles read / bandwidth of the cache
    sums    = bytes of the splits' partial sums, written and read / bandwidth of the cache
    time    = floor + (memory^p + compute^p + unit^p + cache^p)^(1/p) + sums + split log2(s)

and the time of the product is the least over tile shapes, turned ones too, and splits: a library with a good choice.
Roofline: Williams et al., CACM 52 (2009) 4; waves and tiles: NVIDIA, Matrix Multiplication Background User's Guide.
Every term grows with m, n and k, so the time does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GRAIN = 64  # of k: a tile's inner loop takes so many at a time


@dataclass(frozen=True)
class Tile:
    """A tile of y: rows (along m) x columns (along n); efficiency: of a unit's peak, above 0, at most 1."""

    rows: int
    columns: int
    efficiency: float


@dataclass(frozen=True)
class GemmModel:
    """The numbers of the formula above.

    units: that share a product; item_bytes: of a number of x, W and y; unit_gflop_per_s: peak of a unit;
    memory_gb_per_s, cache_gb_per_s: of all units together; unit_gb_per_s: of one; floor_us, wave_us, split_us;
    sharpness: p; hot_fraction, hot_us: the most that compute grows, and where it has grown by half of that;
    splits: of k; tile: shapes.
    """

    units: int
    item_bytes: int
    unit_gflop_per_s: float
    memory_gb_per_s: float
    unit_gb_per_s: float
    cache_gb_per_s: float
    floor_us: float
    wave_us: float
    split_us: float
    sharpness: float
    hot_fraction: float
    hot_us: float
    splits: tuple[int, ...]
    tile: tuple[Tile, ...]

    def seconds(self, m, n, k) -> np.ndarray:
        """s of products of these sizes, which are broadcast; 0 where m, n or k is 0."""
        m, n, k = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (m, n, k)))
        return self.grouped_seconds(m[..., None], n, k)

    def grouped_seconds(self, m_e, n, k) -> np.ndarray:
        """s of products m_e[..., e] x n x k, one for each e, with a W of its own each, as one grouped product: their tiles share the units,
        in the same waves. n, k: [...]; 0 where there is nothing to do."""
        m_e, n, k = np.asarray(m_e, dtype=float), *(np.asarray(x, dtype=float)[..., None] for x in (n, k))
        least = np.min([self._tiled(m_e, n, k, *shape) for shape in self._shapes()], axis=0)
        empty = (m_e.sum(axis=-1, keepdims=True) * n * k)[..., 0] == 0
        return np.where(empty, 0.0, least)

    def _shapes(self) -> list[tuple[int, int, float]]:
        turned = [(t.columns, t.rows, t.efficiency) for t in self.tile if t.rows != t.columns]
        return [(t.rows, t.columns, t.efficiency) for t in self.tile] + turned

    def _tiled(self, m_e, n, k, a: int, b: int, efficiency: float) -> np.ndarray:
        """s with tiles a x b and the best number of splits. m_e: [..., e]; n, k: [..., 1]; the last axis becomes splits."""
        split, tiles_e = np.array(self.splits, dtype=float), np.ceil(m_e / a)
        m, some, tiles_m = (x.sum(axis=-1, keepdims=True) for x in (m_e, m_e > 0, tiles_e))
        tiles = np.maximum(tiles_m * np.ceil(n / b), 1) * split
        waves, k_split = np.ceil(tiles / self.units), np.ceil(k / split / GRAIN) * GRAIN
        compute = waves * (2 * a * b * k_split / (efficiency * self.unit_gflop_per_s * 1e9) + self.wave_us * 1e-6)
        compute = compute * (1 + self.hot_fraction * compute / (compute + self.hot_us * 1e-6))
        memory = self.item_bytes * (some * n * k + m * k + m * n) / (self.memory_gb_per_s * 1e9)
        rows = (tiles_e * np.minimum(a, m_e)).sum(axis=-1, keepdims=True) / np.maximum(tiles_m, 1)  # of x that a tile reads
        tile_bytes = self.item_bytes * k_split * (rows + np.minimum(b, n))
        unit, cache = waves * tile_bytes / (self.unit_gb_per_s * 1e9), tiles * tile_bytes / (self.cache_gb_per_s * 1e9)
        body = _norm(self.sharpness, memory, compute, unit, cache)
        sums = 2 * self.item_bytes * m * n * (split - 1) / (self.cache_gb_per_s * 1e9)
        return (self.floor_us * 1e-6 + body + sums + self.split_us * 1e-6 * np.log2(split)).min(axis=-1)


def _norm(p: float, *times) -> np.ndarray:
    """(sum of times^p)^(1/p); as powers of ratios, which do not overflow."""
    largest = np.maximum.reduce(np.broadcast_arrays(*times))
    return largest * sum((t / largest)**p for t in times)**(1 / p)
