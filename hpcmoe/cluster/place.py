"""Which rank holds which expert of which layer: the least cost that was found, and how far from the least it can be.

With copies balance comes first: balance.plan says how many copies an expert gets and which slots share a place. Then whole places are
exchanged, which leaves the ranks' loads as they are, so that the links carry less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hpcmoe.cluster import exact, search
from hpcmoe.cluster.bound import lower_bound
from hpcmoe.cluster.copies import as_slots, by_place
from hpcmoe.cluster.cost import Load, Prices, Site, between_nodes, cost, fewest_visits, rank_rows, site, visits
from hpcmoe.cluster.machine import Machine
from hpcmoe.data.placement import Predicted
from hpcmoe.data.routing import Routing
from hpcmoe.model.copies import in_order
from hpcmoe.parallel import balance
from hpcmoe.parallel.layout import Layout


class Figures(NamedTuple):
    """One layer's figures under one placement. at_least: rows between nodes of a hierarchical exchange are no fewer
    (equal for two choices per token); seconds: the cost per token."""

    predicted: Predicted
    at_least: float
    seconds: float


@dataclass(frozen=True)
class Solved:
    """expert_ls: the expert in each slot; figures: of "linear", "round-robin" and "chosen", by layer; bound_l: seconds
    per token that no placement of these slots goes below; exact_l: whether all placements were tried."""

    expert_ls: np.ndarray
    figures: dict[str, list[Figures]]
    bound_l: list[float]
    exact_l: list[bool]


def loads(routing: Routing) -> list[Load]:
    """Counts of a run as shares of its tokens, by layer."""
    return [Load(rows_e / tokens, pairs_ee / tokens, routing.top_k)
            for tokens, rows_e, pairs_ee in zip(routing.tokens_l, routing.rows_le, routing.pairs_lee)]


def linear(layout: Layout, experts: int) -> np.ndarray:
    """Slots in order, as without a placement: place [s]."""
    return np.array(layout.owner_of_slot(experts))


def round_robin(site_: Site) -> np.ndarray:
    """Slots dealt to the nodes in turn, and to a node's places in turn: place [s]."""
    left_r, place_s, n = site_.room_r.copy(), [], -1
    for _ in range(int(left_r.sum())):
        n = next(m % site_.nodes for m in range(n + 1, n + 1 + site_.nodes) if left_r[site_.node_r == m % site_.nodes].any())
        mine = np.flatnonzero(site_.node_r == n)
        r = mine[left_r[mine].argmax()]
        left_r[r] -= 1
        place_s.append(int(r))
    return np.array(place_s)


class Choice(NamedTuple):
    """Slots in any order: the expert in each, its load, and its place; exact: all placements of them were tried."""

    expert_s: np.ndarray
    load: Load
    place_s: np.ndarray
    exact: bool


def solve(machine: Machine, layout: Layout, every: list[Load], prices: Prices) -> Solved:
    """A placement for every layer (loads by layer) on the first replica's ranks."""
    experts = len(every[0].p_e)
    in_order_s = in_order(experts, layout.slots(experts))
    sites = [site(machine, layout, stage, experts, prices) for stage in range(layout.pp)]
    tried: dict[tuple, list[np.ndarray]] = {}  # all placements of a stage, made once for stages that are alike
    found = Solved(np.empty((len(every), len(in_order_s)), dtype=np.int64), {"linear": [], "round-robin": [], "chosen": []}, [], [])
    for stage, at in enumerate(sites):
        for layer in layout.layers_of(stage, len(every)):
            plain = {"linear": linear(layout, experts), "round-robin": round_robin(at)}
            load = as_slots(every[layer], in_order_s)
            if layout.replicas:
                chosen = _with_copies(at, every[layer], layer, tried)
            else:
                chosen = _cheapest(at, Choice(in_order_s, load, plain["linear"], False), list(plain.values()), layer, tried)
            for name, place_s in plain.items():
                found.figures[name].append(figures(at, load, place_s))
            found.figures["chosen"].append(figures(at, chosen.load, chosen.place_s))
            found.bound_l.append(found.figures["chosen"][-1].seconds if chosen.exact else lower_bound(at, chosen.load))
            found.exact_l.append(chosen.exact)
            found.expert_ls[layer] = chosen.expert_s[np.argsort(chosen.place_s, kind="stable")]
    return found


def _cheapest(at: Site, slots: Choice, starts: list[np.ndarray], seed: int, tried: dict) -> Choice:
    """These slots where they cost least: all placements are tried where these are few."""
    if not exact.possible(at):
        return slots._replace(place_s=search.solve(at, slots.load, starts, seed))
    key = (at.node_r.tobytes(), at.room_r.tobytes(), exact.alike(at))
    if key not in tried:
        tried[key] = list(exact.partitions(at))
    return slots._replace(place_s=exact.solve(at, slots.load, tried[key]), exact=True)


def _with_copies(at: Site, load: Load, seed: int, tried: dict) -> Choice:
    """The copies and seats of least load of the heaviest rank, and of the ways to put these on ranks the cheapest that was found."""
    expert_s = balance.plan(load.p_e, at.room_r)
    slots = Choice(expert_s, as_slots(load, expert_s), np.repeat(np.arange(len(at.room_r)), at.room_r), False)
    if at.room_r.max() == 1:
        return _cheapest(at, slots, [slots.place_s, round_robin(at)], seed, tried)
    places, whole = by_place(at, slots.load, slots.place_s)
    new_r = search.solve(places, whole, [np.arange(len(at.room_r))], seed, at.room_r)
    return slots._replace(place_s=new_r[slots.place_s])


def figures(site_: Site, load: Load, place_e: np.ndarray) -> Figures:
    """What a placement of one layer comes to; with copies every slot counts as an expert."""
    node_e, n = site_.node_r[place_e], site_.nodes
    flat = between_nodes(site_, visits(load, node_e, n, 0.0))
    once = between_nodes(site_, visits(load, node_e, n, 2 / load.k))
    least, _ = between_nodes(site_, fewest_visits(load, node_e, n))
    busiest = float(rank_rows(load, place_e, len(site_.room_r)).max())
    return Figures(Predicted(*flat, *once, busiest), least, cost(site_, load, place_e))
