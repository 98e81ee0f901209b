"""A limit of rows per expert, as in training: it changes what a model says, and is off unless a job asks for it.

An expert takes at most ceil(factor x t x k / E) rows of one leader's micro-batch of t tokens (GShard's local groups,
arXiv 2006.16668, section 2.2), in token order. A choice beyond that is
- rerouted: once all choices that have room have it, each of the others in token order goes to its token's next best
  expert by the scores that the router chooses by, which has room and is none of the token's already. The weight is what
  the router gives that expert beside the token's own choices, which keep theirs. Where there is no such expert, it is dropped;
- dropped: it adds nothing, and the token's other weights stay as they are.
"""

from __future__ import annotations

import math

import numpy as np

from hpcmoe.config import RouterConfig, RunJob
from hpcmoe.errors import at
from hpcmoe.model.copies import Copies
from hpcmoe.model.route import Route, route
from hpcmoe.model.router import scores, weights_beside

DROPPED = -1  # in place of an expert


def check(run: RunJob, router: RouterConfig) -> None:
    """UserError where this router's choices cannot be rerouted."""
    if run.capacity_factor and run.over_capacity == "reroute" and router.score == "sparsemixer":
        raise at("job", "run.over_capacity", "reroute", "drop: a SparseMixer router's weight of an expert depends on the choices before it")


def room(factor: float, tokens: int, router: RouterConfig) -> int:
    """Rows that an expert takes of a micro-batch of so many tokens."""
    return math.ceil(factor * tokens * router.top_k / router.experts - 1e-9)  # 1.1 x 160 / 16 is 11, not 12


class Capacity:
    """The limit on one leader. counted: {layer: [rows rerouted, rows dropped]} so far."""

    def __init__(self, run: RunJob, router: RouterConfig, layers: list[int]):
        self.factor, self.reroute, self.router = run.capacity_factor, run.over_capacity == "reroute", router
        self.counted = {layer: [0, 0] for layer in layers}

    def limit(self, layer: int, expert_tk, weight_tk, logit_te, bias_e):
        """(expert_tk, weight_tk) once no expert has more rows than it takes; DROPPED stands for choices that are left out."""
        t, most = len(expert_tk), room(self.factor, len(expert_tk), self.router)
        if most >= t:
            return expert_tk, weight_tk
        by_expert = route(expert_tk, self.router.experts)
        first_e = np.cumsum(by_expert.n_send_e) - by_expert.n_send_e
        over_tk = by_expert.slot_tk - first_e[expert_tk] >= most
        kept_tk = np.where(over_tk, DROPPED, expert_tk)
        if self.reroute and over_tk.any():
            left_e = most - np.minimum(by_expert.n_send_e, most)
            weight_tk = self._reroute(kept_tk, expert_tk, weight_tk, logit_te, bias_e, left_e)
        dropped = int((kept_tk == DROPPED).sum())
        self.counted[layer][0] += int(over_tk.sum()) - dropped
        self.counted[layer][1] += dropped
        return kept_tk, weight_tk

    def _reroute(self, kept_tk, expert_tk, weight_tk, logit_te, bias_e, left_e):
        """Fills kept_tk where left_e, the room that is left, allows; the weights that go with it."""
        weight_tk, token_x = weight_tk.copy(), np.flatnonzero((kept_tk == DROPPED).any(axis=1))
        score_xe, choice_xe = scores(logit_te[token_x], self.router, bias_e)
        choice_xe = choice_xe.copy()
        np.put_along_axis(choice_xe, expert_tk[token_x], -np.inf, axis=1)
        beside_xe = weights_beside(score_xe, expert_tk[token_x], self.router)
        for x, t in enumerate(token_x):
            for k in np.flatnonzero(kept_tk[t] == DROPPED):
                able_e = np.where(left_e > 0, choice_xe[x], -np.inf)
                e = int(able_e.argmax())
                if able_e[e] == -np.inf:
                    break
                kept_tk[t, k], weight_tk[t, k] = e, beside_xe[x, e]
                left_e[e] -= 1
                choice_xe[x, e] = -np.inf
        return weight_tk


def route_kept(expert_tk, experts: int, copies: Copies, leader: int) -> tuple[Route, np.ndarray]:
    """As Copies.spread of route(expert_tk), for choices of which some are DROPPED: these have slot -1."""
    pair_p = np.flatnonzero(expert_tk != DROPPED)
    expert_p1 = expert_tk.reshape(-1)[pair_p][:, None]
    of_pairs, copy_p1 = copies.spread(expert_p1, route(expert_p1, experts), leader)
    slot_tk, copy_tk = np.full((2, *expert_tk.shape), -1, dtype=np.int64)
    slot_tk.reshape(-1)[pair_p], copy_tk.reshape(-1)[pair_p] = of_pairs.slot_tk[:, 0], copy_p1[:, 0]
    return Route(pair_p[of_pairs.token_s] // expert_tk.shape[1], slot_tk, of_pairs.n_send_e), copy_tk
