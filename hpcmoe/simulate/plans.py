"""How often a CPU's products meet a number of rows for the first time: the library then plans a product of that shape (oneDNN compiles
one), which takes longer than the product itself where weights are small. All layers of a rank share the plans of a shape, and many rows are
cut into slabs, of which the last one may be of a new size.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

SIGMAS = 6.0      # of a number of rows, beyond which it is not looked for
SETTLED = 1e-3    # so few new plans: no more are looked for with as many tokens


def last_slab(rows, slab: int):
    """Rows of the last slab of so many rows, at most `slab` in one (0: all in one)."""
    return (rows - 1) % slab + 1 if slab else rows


def first_seen(counts: list[int], slab: int) -> list[bool]:
    """Which of some numbers of rows, in order, has a last slab that has not been there before; none of 0."""
    seen: set[int] = set()
    sizes = [last_slab(count, slab) if count else 0 for count in counts]
    return [bool(size) and size not in seen and not seen.add(size) for size in sizes]


class Unseen:
    """The plans of one rank's experts: how many new ones each step of a layer is expected to need.

    An expert e of which each of n tokens makes a choice with probability p_e has a binomial number of rows.
    """

    def __init__(self, slab: int):
        self.slab = slab
        self.unseen_m = np.ones(1 + slab)  # by rows of the last slab: the probability that there has been none like it
        self.settled: set[tuple[int, bytes]] = set()

    def new(self, tokens: int, chance_e: np.ndarray) -> float:
        """Expected new numbers of rows; they are not new any more."""
        key = tokens, chance_e.tobytes()
        if not tokens or key in self.settled:
            return 0.0
        if not self.slab and len(self.unseen_m) <= tokens:
            self.unseen_m = np.concatenate([self.unseen_m, np.ones(tokens + 1 - len(self.unseen_m))])
        none_m = np.ones(len(self.unseen_m))  # that no expert has so many rows now
        for chance in np.minimum(chance_e, 1.0):
            first, pmf = _binomial(tokens, float(chance))
            rows = np.arange(first, first + len(pmf))
            np.multiply.at(none_m, last_slab(rows[rows > 0], self.slab), 1 - pmf[rows > 0])
        found = float((self.unseen_m * (1 - none_m)).sum())
        self.unseen_m *= none_m
        if found < SETTLED:
            self.settled.add(key)
        return found


def _binomial(n: int, p: float) -> tuple[int, np.ndarray]:
    """(first number of successes, probabilities from there on) within SIGMAS of the mean."""
    if p <= 0 or p >= 1:
        return round(n * p), np.ones(1)
    spread = SIGMAS * math.sqrt(n * p * (1 - p)) + 1
    m, log_factorial = np.arange(max(0, math.floor(n * p - spread)), min(n, math.ceil(n * p + spread)) + 1), _log_factorial(n)
    return int(m[0]), np.exp(log_factorial[n] - log_factorial[m] - log_factorial[n - m] + m * math.log(p) + (n - m) * math.log1p(-p))


@lru_cache(maxsize=64)
def _log_factorial(n: int) -> np.ndarray:
    """Of 0 to n."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
