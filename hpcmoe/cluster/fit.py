"""Least squares on the logarithm of times, with NumPy alone: Levenberg and Marquardt's method.

Residuals are log(model / measured), so every row counts by its relative error, whatever its size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Callable, NamedTuple

import numpy as np

STEP = 0.01      # of the finite differences, in the parameters' own (logarithmic) scale
MOST_STEP = 0.3  # of one iteration


class FitError(NamedTuple):
    """Relative errors |model / measured - 1| over some rows: mean, 95th percentile, largest; mean of log(model / measured)."""

    rows: int
    mean: float
    p95: float
    largest: float
    bias: float

    @classmethod
    def of(cls, model: np.ndarray, measured: np.ndarray) -> FitError:
        e = np.abs(model / measured - 1)
        return cls(len(e), float(e.mean()), float(np.percentile(e, 95)), float(e.max()), float(np.log(model / measured).mean()))

    def __str__(self) -> str:
        return (f"{self.rows:,} rows: mean absolute error {100 * self.mean:.1f} %, 95th percentile {100 * self.p95:.1f} %, "
                f"largest {100 * self.largest:.0f} %, bias {100 * self.bias:+.1f} %")


def least_squares(seconds: Callable[[np.ndarray], np.ndarray], start: np.ndarray, measured: np.ndarray,
                  iterations: int = 40, tell: Callable[[int, float], None] = lambda i, e: None) -> np.ndarray:
    """Parameters near `start` that make log(seconds(parameters) / measured) small, as root mean square.

    seconds: of every row, positive, smooth almost everywhere; tell(iteration, root mean square) is called after each.
    A step that does not help is shortened; where none helps, the search ends.
    """
    def residuals(x: np.ndarray) -> np.ndarray:
        return np.log(seconds(x) / measured)

    x, damping = np.array(start, dtype=float), 1e-2
    r = residuals(x)
    for i in range(iterations):
        jacobian = np.stack([(residuals(x + h) - r) / STEP for h in STEP * np.eye(len(x))], axis=1)
        normal, slope = jacobian.T @ jacobian, jacobian.T @ r
        while damping < 1e6:
            lift = damping * (np.diag(np.diag(normal)) + 1e-3 * np.eye(len(x)))
            tried = x - np.clip(np.linalg.solve(normal + lift, slope), -MOST_STEP, MOST_STEP)
            r_tried = residuals(tried)
            if r_tried @ r_tried < r @ r:
                break
            damping *= 4
        else:
            return x
        gained = 1 - (r_tried @ r_tried) / (r @ r)
        x, r, damping = tried, r_tried, damping / 3
        tell(i + 1, float(np.sqrt(r @ r / len(r))))
        if gained < 1e-5:
            break
    return x


def rounded(model, digits: int = 4):
    """A dataclass with so many digits of each of its numbers: what a file holds is what was judged."""
    return replace(model, **{name: float(f"{v:.{digits}g}") for name, v in vars(model).items() if type(v) is float})
