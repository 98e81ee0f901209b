"""Experts: dense products on the rows that dispatch brought."""

from __future__ import annotations

from hpcmoe.config import ExpertConfig


class Expert:
    """down(act(gate x) * up x), the weights owned by a Linear object in their best layout."""

    def __init__(self, config: ExpertConfig, backend, weights: dict):
        self.product = backend.expert(weights["gate"], weights["up"], weights["down"], config.activation)
        self.nbytes = self.product.nbytes

    def __call__(self, x_id, out=None):
        """y [i, d] of rows x [i, d]."""
        return self.product(x_id, out=out)


def flop_per_row(d: int, f: int) -> int:
    """Floating-point operations of one row through one gated expert: three products of d x f."""
    return 6 * d * f
