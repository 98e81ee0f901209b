"""How often a CPU's products meet a number of rows for the first time: the library then plans a product of that shape (oneDNN compiles
one), which takes longer than the product itself where weights are small. All layers of a rank share the plans of a shape.
"""

from __future__ import annotations

import math

import numpy as np

SIGMAS = 6.0      # of a number of rows, beyond which it is not looked for
SETTLED = 1e-3    # so few new plans: no more are looked for with as many tokens


def first_seen(counts: list[int]) -> list[bool]:
    """Which of some numbers, in order, has not been there before; 0 never counts."""
    seen: set[int] = {0}
    return [count not in seen and not seen.add(count) for count in counts]


class Unseen:
    """The plans of one rank's experts: how many new ones each step of a layer is expected to need.

    An expert e of which each of n tokens makes a choice with probability p_e has a binomial number of rows.
    """

    def __init__(self):
        self.unseen_m = np.ones(1)  # by number of rows: the probability that none has had it yet
        self.settled: set[tuple[int, bytes]] = set()

    def new(self, tokens: int, chance_e: np.ndarray) -> float:
        """Expected new numbers of rows; they are not new any more."""
        key = tokens, chance_e.tobytes()
        if not tokens or key in self.settled:
            return 0.0
        if len(self.unseen_m) <= tokens:
            self.unseen_m = np.concatenate([self.unseen_m, np.ones(tokens + 1 - len(self.unseen_m))])
        none_m = np.ones(tokens + 1)  # that no expert has so many rows now
        for chance in np.minimum(chance_e, 1.0):
            first, pmf = _binomial(tokens, float(chance))
            none_m[first:first + len(pmf)] *= 1 - pmf
        none_m[0] = 1.0  # without rows nothing is computed
        found = float((self.unseen_m[:tokens + 1] * (1 - none_m)).sum())
        self.unseen_m[:tokens + 1] *= none_m
        if found < SETTLED:
            self.settled.add(key)
        return found


def _binomial(n: int, p: float) -> tuple[int, np.ndarray]:
    """(first number of successes, probabilities from there on) within SIGMAS of the mean."""
    if p <= 0 or p >= 1:
        return round(n * p), np.ones(1)
    spread = SIGMAS * math.sqrt(n * p * (1 - p)) + 1
    m = np.arange(max(0, math.floor(n * p - spread)), min(n, math.ceil(n * p + spread)) + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    return int(m[0]), np.exp(log_factorial[n] - log_factorial[m] - log_factorial[n - m] + m * math.log(p) + (n - m) * math.log1p(-p))
