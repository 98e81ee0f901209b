"""Who sends how many rows to whom in a layer: flat and hierarchical exchanges, sums over tensor shards.

Letters: r, s places of a stage (from, to); e experts; n nodes of the stage. Rows of dispatch; combine is the transpose.
"""

from __future__ import annotations

from math import comb
from typing import NamedTuple, Sequence

import numpy as np

from hpcmoe.parallel.layout import share
from hpcmoe.parallel.nodes import Nodes


class Hops(NamedTuple):
    """A hierarchical dispatch. between_rs: rows from leaders to forwarders on other nodes; within_rs: rows that leaders and
    forwarders hand on to the places of their node (own ones on the diagonal)."""

    between_rs: np.ndarray
    within_rs: np.ndarray


# ---------------------------------------------------------------- from routing
def flat_rows(expert_tk_r: Sequence[np.ndarray | None], owner_e) -> np.ndarray:
    """Rows from each place to each of a flat dispatch: [r, s].

    expert_tk_r: of each place the choices of its tokens, None where it does not lead; owner_e: the place of each expert.
    """
    owner_e, places = np.asarray(owner_e), len(expert_tk_r)
    rows_rs = np.zeros((places, places))
    for r, expert_tk in enumerate(expert_tk_r):
        if expert_tk is not None:
            rows_rs[r] = np.bincount(owner_e[np.asarray(expert_tk).ravel()], minlength=places)
    return rows_rs


def hierarchical_rows(expert_tk_r: Sequence[np.ndarray | None], owner_e, node_r) -> Hops:
    """Rows of both hops of a hierarchical dispatch; node_r: the node of each place, by any name."""
    owner_e, places = np.asarray(owner_e), len(expert_tk_r)
    between_rs, within_rs = np.zeros((places, places)), np.zeros((places, places))
    nodes = Nodes(node_r, 0)
    for r, expert_tk in enumerate(expert_tk_r):
        if expert_tk is None or not len(expert_tk):
            continue
        place_tk, here = owner_e[np.asarray(expert_tk)], nodes.number_r[r]
        node_tk, rows_s = nodes.number_r[place_tk], np.bincount(place_tk.ravel(), minlength=places)
        for n, mates in enumerate(nodes.members):
            hander = r if n == here else nodes.forwarder(r, n)
            within_rs[hander, mates] += rows_s[mates]
            if n != here:
                between_rs[r, hander] += (node_tk == n).any(axis=1).sum()
    return Hops(between_rs, within_rs)


# ---------------------------------------------------------------- expected, for even random choices
def even_flat_rows(rows_r, experts_s, k: int) -> np.ndarray:
    """Expected rows [r, s] where place r leads rows_r tokens and place s has experts_s of the experts: an outer product."""
    experts_s = np.asarray(experts_s, dtype=float)
    return np.outer(rows_r, k * experts_s / experts_s.sum())


def even_hierarchical_rows(rows_r, experts_s, k: int, node_r) -> Hops:
    """Expected rows of both hops where every k of the experts are equally likely.

    A token needs a node with E' of E experts with probability 1 - C(E - E', k) / C(E, k).
    """
    rows_r, experts_s = np.asarray(rows_r, dtype=float), np.asarray(experts_s)
    places, experts = len(rows_r), int(experts_s.sum())
    between_rs, within_rs = np.zeros((places, places)), np.zeros((places, places))
    nodes = Nodes(node_r, 0)
    needs_n = [1 - comb(experts - int(experts_s[m].sum()), k) / comb(experts, k) for m in nodes.members]
    for r in np.flatnonzero(rows_r):
        here = nodes.number_r[r]
        for n, mates in enumerate(nodes.members):
            hander = r if n == here else nodes.forwarder(int(r), n)
            within_rs[hander, mates] += rows_r[r] * k * experts_s[mates] / experts
            if n != here:
                between_rs[r, hander] += rows_r[r] * needs_n[n]
    return Hops(between_rs, within_rs)


# ---------------------------------------------------------------- tensor shards
def sum_rows(rows: int, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """(reduce-scatter, all-gather) of the rows that tensor shards sum: rows from each shard to each, [shards, shards]."""
    n_j = np.array([len(share(rows, shards, j)) for j in range(shards)], dtype=float)
    away = 1 - np.eye(shards)
    return away * n_j, away * n_j[:, None]
