"""What no placement of a layer can cost less than: real bounds, so that a gap to them is one to the optimum.

Each term of the cost is bounded by itself; their sum bounds the sum. Tests hold every bound against brute force.
"""

from __future__ import annotations

import numpy as np

from hpcmoe.cluster.cost import Load, Site


def lower_bound(site: Site, load: Load) -> float:
    """Seconds per token that no placement goes below (cost.cost)."""
    room_n = np.bincount(site.node_r, weights=site.room_r, minlength=site.nodes).astype(int)
    pairs = most_pairs(load, room_n) if site.overlap else 0.0
    mean = least_weighted(site, load, room_n, site.mean_n, pairs)
    # The busiest of some links is at least their mean; the classes are links in, links out, and the switches'.
    n = site.nodes
    classes = [site.link_ln[:n], site.link_ln[n:2 * n], site.link_ln[2 * n:]]
    link = max(least_weighted(site, load, room_n, rows.mean(axis=0), pairs) for rows in classes if len(rows))
    hottest = float(site.link_ln.max(axis=0).min() * load.p_e.max())  # some node has the hottest expert
    return mean + max(link, hottest) + site.rank_s * busiest_rank(site, load)


def busiest_rank(site: Site, load: Load) -> float:
    """Rows per token on the busiest rank: the hottest expert, the mean, or two of the hottest where they must share."""
    p_e, places = np.sort(load.p_e)[::-1], len(site.room_r)
    shared = p_e[places - 1] + p_e[places] if len(p_e) > places else 0.0  # places + 1 experts: two of them on one place
    return float(max(p_e[0], p_e.sum() / places, shared))


def least_weighted(site: Site, load: Load, room_n: np.ndarray, weight_n: np.ndarray, pairs: float) -> float:
    """At least so much is the sum of weight_n * T_n; pairs: most_pairs of the layer.

    The part linear in p is least when hot experts are on light nodes (rearrangement); the rest is at most
    overlap * (largest weight) * pairs. Besides, a token's choices need at least so many nodes.
    """
    order = np.argsort(weight_n, kind="stable")
    light_e = np.repeat(weight_n[order], room_n[order])
    linear = float(np.sort(load.p_e)[::-1] @ light_e) - site.overlap * float(weight_n.max()) * pairs
    needed = int(np.searchsorted(np.cumsum(np.sort(room_n)[::-1]), load.k)) + 1
    return max(linear, float(np.sort(weight_n)[:needed].sum()))


def most_pairs(load: Load, room_n: np.ndarray) -> float:
    """At most so much q lies between experts of one node, over all nodes."""
    partners = np.sort(load.q_ee, axis=1)[:, ::-1][:, :max(room_n.max() - 1, 0)]
    return min(float(partners.sum()) / 2, spectral(load.q_ee, room_n), float(load.q_ee.sum()) / 2)


def spectral(q_ee: np.ndarray, room_n: np.ndarray) -> float:
    """Upper bound on the q within nodes of room_n experts, by eigenvalues.

    For any u with sum 0: 2 (q within nodes) = tr(X' (Q + diag u) X) <= sum of room_(i) * eigenvalue_i, both in
    descending order (Donath and Hoffman 1973). With equal rooms the vector of ones lies in the span of X, and its
    part is known: the others come from the space orthogonal to it (Rendl and Wolkowicz 1995). u is improved by a
    few subgradient steps; every one of them gives a bound, and the least is taken.
    """
    e, equal = len(q_ee), len(set(room_n.tolist())) == 1
    room = np.sort(room_n)[::-1].astype(float)[int(equal):]
    known = room_n[0] * q_ee.sum() / e if equal else 0.0
    ones = np.full((e, 1), e**-0.5)
    degree = q_ee.sum(axis=1)
    shift = degree.mean() - degree  # Q + diag(shift): the graph's Laplacian, negated and moved
    best = np.inf
    for step in range(int(np.clip(1000 // e, 4, 60))):
        m = q_ee + np.diag(shift)
        if equal:  # the ones are sent far below the other eigenvalues
            m = m - ones @ (ones.T @ m) - (m @ ones) @ ones.T + ones @ (ones.T @ m @ ones) @ ones.T - 1e3 * (1 + np.abs(m).max()) * ones @ ones.T
        value, vector = np.linalg.eigh(m)
        value, vector = value[::-1][:len(room)], vector[:, ::-1][:, :len(room)]
        bound = known + float(room @ value)
        best = min(best, bound)
        slope = vector**2 @ room
        slope = slope - slope.mean()
        size = float(slope @ slope)
        if size < 1e-18:
            break
        shift = shift - (0.3 * bound / (1 + step) ** 0.5) * slope / size * 0.1
    return best / 2
