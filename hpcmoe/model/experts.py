"""Experts: dense products on the rows that dispatch brought."""

from __future__ import annotations

import copy
import hashlib
import math

import numpy as np

from hpcmoe.config import ExpertConfig


class Expert:
    """down(act(gate x) * up x), the weights owned by a Linear object in their best layout."""

    def __init__(self, config: ExpertConfig, backend, weights: dict):
        self.product = backend.expert(weights["gate"], weights["up"], weights["down"], config.activation)
        self.nbytes = self.product.nbytes

    def __call__(self, x_id, out=None):
        """y [i, d] of rows x [i, d]."""
        return self.product(x_id, out=out)

    def weights(self) -> list[np.ndarray]:
        """As they are owned, as bytes: written over, they make another expert of the same shape."""
        return self.product.weights()

    def layout(self) -> str:
        """Of a `pattern`: the same on two ranks where weights lie in memory in the same way."""
        return hashlib.sha256(b"".join(part.tobytes() for part in self.weights())).hexdigest()

    def clone(self) -> "Expert":
        """The same expert with weights of its own."""
        twin = copy.copy(self)
        twin.product = self.product.clone()
        return twin


def pattern(config: ExpertConfig, backend, shapes: dict) -> Expert:
    """An expert whose weights are the same everywhere: how they lie in memory can be compared, and they can be written over."""
    return Expert(config, backend, {name: np.arange(math.prod(shape), dtype=np.float32).reshape(shape) % 251 for name, shape in shapes.items()})


def flop_per_row(d: int, f: int) -> int:
    """Floating-point operations of one row through one gated expert: three products of d x f."""
    return 6 * d * f
