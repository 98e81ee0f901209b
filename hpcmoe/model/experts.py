"""Experts: dense products on the rows that dispatch brought."""

from __future__ import annotations

from hpcmoe.config import ExpertConfig


class Expert:
    """down(act(gate x) * up x), the weights owned by Linear objects in their best layout."""

    def __init__(self, config: ExpertConfig, backend, weights: dict):
        self.glu = backend.glu(weights["gate"], weights["up"], config.activation)
        self.down = backend.linear(weights["down"])

    @property
    def nbytes(self) -> int:
        return self.glu.nbytes + self.down.nbytes

    def __call__(self, x_id, out=None):
        """y [i, d] of rows x [i, d]."""
        return self.down(self.glu(x_id), out=out)


def flop_per_row(d: int, f: int) -> int:
    """Floating-point operations of one row through one gated expert: three products of d x f."""
    return 6 * d * f
