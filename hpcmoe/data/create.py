"""Random weights of any geometry, for benchmarks and tests: written as fast as a disk takes them."""

from __future__ import annotations

import math
from typing import Callable, Iterator

import numpy as np

from hpcmoe.config import ModelConfig
from hpcmoe.data.schema import Unit
from hpcmoe.data.weights_write import Header, WeightsWriter
from hpcmoe.model.dtypes import STORED, from_fp32
from hpcmoe.model.tensors import check_model

POOL = 1 << 20    # normal values drawn once for each scale
WINDOW = 1 << 14  # values copied at a time from a random place of the pool


def create(path: str, config: ModelConfig, dtype: str, seed: int = 0,
           progress: Callable[[int, int, str], None] = lambda done, total, name: None) -> int:
    """Writes a weights file with random values; returns the bytes of its tensors.

    Products keep the size of their input (normal, standard deviation 1 / sqrt(inputs)), norms are 1,
    biases are small, so that activations neither vanish nor grow beyond the type's range. A tensor's
    values depend on the seed and its name only. They are windows of one pool of normal values:
    random enough for timing, routing and correctness, and as fast as copying.

    Raises UserError for an impossible configuration or a file that cannot be written.
    """
    check_model(config, "weights create")
    header = Header(config, dtype, notes={"made_by": f"hpcmoe weights create, seed {seed}"},
                    fingerprint=f"random {seed}")
    normal = np.random.Generator(np.random.SFC64(seed)).standard_normal(POOL, dtype=np.float32)
    pools: dict[float, np.ndarray] = {}

    def pool(scale: float) -> np.ndarray:
        if scale not in pools:
            pools[scale] = from_fp32(normal * np.float32(scale), dtype)
        return pools[scale]

    with WeightsWriter(path, header) as writer:
        total = sum(writer.nbytes(unit) for unit in writer.units)
        done = total
        for _, unit in writer.pending():
            done -= writer.nbytes(unit)
        for row, unit in writer.pending():
            writer.write(row, _values(unit, dtype, pool, np.random.Generator(np.random.SFC64([seed, row]))))
            done += writer.nbytes(unit)
            progress(done, total, unit.name)
        writer.finish()
    return total


def _values(unit: Unit, dtype: str, pool, rng) -> Iterator[np.ndarray]:
    """The unit's values, part after part, in pieces."""
    out = np.empty(64 * WINDOW, STORED[dtype])
    for name, shape in unit.parts.items():
        count = math.prod(shape)
        if name.endswith("norm"):
            yield from_fp32(np.ones(count, np.float32), dtype)
            continue
        source = pool(0.02 if len(shape) == 1 else 1.0 / math.sqrt(shape[-1]))
        while count:
            size = min(count, len(out))
            starts = rng.integers(0, POOL - WINDOW, -(-size // WINDOW))
            for i, start in enumerate(starts.tolist()):
                piece = out[i * WINDOW:min((i + 1) * WINDOW, size)]
                piece[...] = source[start:start + len(piece)]
            yield out[:size]
            count -= size
