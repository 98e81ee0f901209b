"""What one layer of a placement costs on one stage of a machine: a formula of node visits, exact for top-2.

Per token: p_e is how often it chooses expert e, q_ef how often both e and f; a node's *visits* T_n say how often a
token goes to node n. In a flat exchange every (token, choice) pair travels by itself: T_n = sum of p over the
node's experts. In a hierarchical one a row crosses to a node once, however many of its experts live there:
T_n = sum of p - c * (sum of q over pairs of experts of the node). With c = 1 and two choices per token that is
inclusion and exclusion, exact. For k > 2 pairs do not determine T_n; with c = 2 / k it is an upper bound, since a
token with j choices on the node counts j - j (j - 1) / k >= 1, and `fewest_visits` is a lower one. A link's load is
linear in T_n, because tokens come from leaders that do not depend on where experts are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hpcmoe.cluster.machine import Machine
from hpcmoe.parallel.layout import Layout


class Load(NamedTuple):
    """One layer's routing: p_e and q_ee (symmetric, 0 on the diagonal) per token; k choices of a token."""

    p_e: np.ndarray
    q_ee: np.ndarray
    k: int


@dataclass(frozen=True)
class Site:
    """One stage of a machine.

    node_r, room_r: node (numbered from 0 within the stage) and number of slots of each place; home_n: the share of
    tokens whose leader is on the node; link_ln: s per token of each link for one visit per token to a node, node links
    first (in, then out); mean_n: the same for the mean of the links into nodes; rank_s: s per row on a rank; overlap: c
    of this exchange, 0 for a flat one.
    """

    node_r: np.ndarray
    room_r: np.ndarray
    home_n: np.ndarray
    link_ln: np.ndarray
    mean_n: np.ndarray
    rank_s: float
    overlap: float

    @property
    def nodes(self) -> int:
        return len(self.home_n)


class Prices(NamedTuple):
    """row_bytes: of a row of dispatch and of combine; row_flop: of an expert; exchange: "flat" or "hierarchical"; k."""

    row_bytes: float
    row_flop: float
    exchange: str
    k: int


def site(machine: Machine, layout: Layout, stage: int, experts: int, prices: Prices) -> Site:
    """A stage of the first replica on a machine's first ranks."""
    ranks = layout.column(0, stage)
    global_r = np.array(machine.node_of_rank)[ranks.start:ranks.stop]
    global_n, node_r = np.unique(global_r, return_inverse=True)
    leaders = layout.leader_places(machine.node_of_rank, 0)[stage]
    home_n = np.bincount(node_r[leaders], minlength=len(global_n)) / len(leaders)
    seconds_n = 2 * prices.row_bytes / np.array(machine.bandwidth_n)[global_n]  # dispatch, and combine the other way
    into_n = (1 - home_n) * seconds_n
    links = [np.diag(into_n), (1 - np.eye(len(global_n))) * (home_n * seconds_n)[:, None]]
    switch_n = np.array(machine.switch_n)[global_n]
    if len(set(switch_n)) > 1:
        inside_wn = switch_n[None, :] == np.unique(switch_n)[:, None]
        home_w, seconds = (inside_wn @ home_n)[:, None], 2 * prices.row_bytes / machine.uplink
        links += [inside_wn * (1 - home_w) * seconds, ~inside_wn * home_w * seconds]
    room_r = np.array([len(layout.slots_of(place, experts)) for place in range(layout.ep)])
    overlap = 0.0 if prices.exchange == "flat" else 2 / prices.k
    return Site(node_r, room_r, home_n, np.concatenate(links), into_n / len(global_n), prices.row_flop / machine.rank_flop, overlap)


def shares(load: Load, node_e: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """(sum of p, sum of q over pairs) of the experts of each node: [n] and [n]."""
    on_en = np.eye(nodes)[node_e]
    return load.p_e @ on_en, ((load.q_ee @ on_en) * on_en).sum(axis=0) / 2


def visits(load: Load, node_e: np.ndarray, nodes: int, overlap: float) -> np.ndarray:
    """T_n: how often a token goes to each node; for a hierarchical exchange of k > 2 choices at most."""
    rows_n, pairs_n = shares(load, node_e, nodes)
    return rows_n - overlap * pairs_n


def fewest_visits(load: Load, node_e: np.ndarray, nodes: int) -> np.ndarray:
    """At least so often a token goes to each node in a hierarchical exchange (Dawson and Sankoff 1967); exact for k <= 2."""
    rows_n, pairs_n = shares(load, node_e, nodes)
    i = 1 + np.floor(np.divide(2 * pairs_n, rows_n, out=np.zeros_like(rows_n), where=rows_n > 0))
    return 2 / (i + 1) * rows_n - 2 / (i * (i + 1)) * pairs_n


def rank_rows(load: Load, place_e: np.ndarray, places: int) -> np.ndarray:
    """Rows per token of each place: [r]."""
    return np.bincount(place_e, weights=load.p_e, minlength=places)


def cost(site_: Site, load: Load, place_e: np.ndarray) -> float:
    """Seconds per token: the busiest link, the busiest rank, and the mean of the links into nodes.

    The mean decides between placements whose busiest link is the same, for the one that sends fewer rows.
    """
    visit_n = visits(load, site_.node_r[place_e], site_.nodes, site_.overlap)
    busiest = rank_rows(load, place_e, len(site_.room_r)).max()
    return float((site_.link_ln @ visit_n).max() + site_.mean_n @ visit_n + site_.rank_s * busiest)


def between_nodes(site_: Site, visit_n: np.ndarray) -> tuple[float, float]:
    """(rows between nodes, rows over the busiest node's link in its busier direction) per token of one dispatch."""
    into_n = (1 - site_.home_n) * visit_n
    out_n = site_.home_n * (visit_n.sum() - visit_n)
    return float(into_n.sum()), float(max(into_n.max(), out_n.max()))
