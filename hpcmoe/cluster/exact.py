"""The best placement of a layer by trying all of them, where they are few."""

from __future__ import annotations

import itertools
import math
from typing import Iterator

import numpy as np

from hpcmoe.cluster.cost import Load, Site

MOST = 3_000_000  # placements that are tried
MOST_EXPERTS = 16  # a table of all sets of experts is made
CHUNK = 1 << 17


def groups(site: Site) -> tuple[np.ndarray, np.ndarray]:
    """(experts, node) of each group of places that need not be told apart: a node's, where each place has one expert."""
    if site.room_r.max() > 1:
        return site.room_r, site.node_r
    return np.bincount(site.node_r, minlength=site.nodes), np.arange(site.nodes)


def alike(site: Site) -> bool:
    """Whether nodes can be exchanged: the same rooms, leaders and links, and one expert per place."""
    room_g, _ = groups(site)
    n = site.nodes
    same = all(np.ptp(a) == 0 for a in (room_g, site.home_n, site.mean_n, np.diag(site.link_ln[:n])))
    return bool(site.room_r.max() == 1 and same and len(site.link_ln) == 2 * n)


def count(site: Site) -> int:
    """How many placements there are to try."""
    room_g, _ = groups(site)
    total = math.factorial(int(room_g.sum())) // math.prod(math.factorial(int(room)) for room in room_g)
    return total // math.factorial(len(room_g)) if alike(site) else total


def possible(site: Site) -> bool:
    return int(site.room_r.sum()) <= MOST_EXPERTS and count(site) <= MOST


def partitions(site: Site) -> Iterator[np.ndarray]:
    """All placements, in parts: int [placement, group] of sets of experts as bits."""
    room_g, _ = groups(site)
    experts, first_fixed = int(room_g.sum()), alike(site)

    def extend(mask_pg: np.ndarray, left_pe: np.ndarray, g: int) -> Iterator[np.ndarray]:
        if g == len(room_g):
            yield mask_pg
            return
        held = int(room_g[g])
        size = left_pe.shape[1]
        chosen = [c for c in itertools.combinations(range(size), held) if not first_fixed or c[0] == 0]
        rest = np.array([[i for i in range(size) if i not in c] for c in chosen], dtype=np.int64).reshape(len(chosen), -1)
        chosen_ck = np.array(chosen, dtype=np.int64)
        step = max(1, CHUNK // len(chosen))
        for start in range(0, len(left_pe), step):
            left = left_pe[start:start + step]
            mask = (1 << left[:, chosen_ck].astype(np.int32)).sum(axis=2, dtype=np.int32)  # [p, c]
            before = np.repeat(mask_pg[start:start + step], len(chosen), axis=0)
            yield from extend(np.concatenate([before, mask.reshape(-1, 1)], axis=1),
                              left[:, rest].reshape(mask.size, rest.shape[1]), g + 1)

    yield from extend(np.zeros((1, 0), dtype=np.int32), np.arange(experts, dtype=np.int8)[None], 0)


def solve(site: Site, load: Load, every: list[np.ndarray]) -> np.ndarray:
    """The place of each expert [e] in a placement of least cost. every: the parts of `partitions`."""
    rows_s, pairs_s = _tables(load)
    room_g, node_g = groups(site)
    by_place = site.room_r.max() > 1
    # visits are linear in rows and pairs of the node's set; the link loads are linear in visits
    best, found = np.inf, None
    for mask_pg in every:
        mask_pn = mask_pg
        if by_place:
            mask_pn = np.stack([mask_pg[:, node_g == n].sum(axis=1) for n in range(site.nodes)], axis=1)
        visit_pn = rows_s[mask_pn] - site.overlap * pairs_s[mask_pn]
        seconds = (visit_pn @ site.link_ln.T).max(axis=1) + visit_pn @ site.mean_n
        if by_place:
            seconds = seconds + site.rank_s * rows_s[mask_pg].max(axis=1)
        i = int(seconds.argmin())
        if seconds[i] < best:
            best, found = seconds[i], mask_pg[i]
    return _places(site, found)


def _tables(load: Load) -> tuple[np.ndarray, np.ndarray]:
    """Sum of p, and of q over pairs, of every set of experts, by its bits."""
    rows, pairs = np.zeros(1), np.zeros(1)
    inside = np.zeros((1, len(load.p_e)))  # q of each expert with the experts of the set
    for e, p in enumerate(load.p_e):
        rows, pairs = np.concatenate([rows, rows + p]), np.concatenate([pairs, pairs + inside[:, e]])
        inside = np.concatenate([inside, inside + load.q_ee[e]])
    return rows, pairs


def _places(site: Site, mask_g: np.ndarray) -> np.ndarray:
    """The place of each expert, from the groups' sets: experts of a node in order on its places."""
    place_e = np.empty(int(site.room_r.sum()), dtype=np.int64)
    for g, mask in enumerate(mask_g):
        members = [e for e in range(len(place_e)) if mask >> e & 1]
        place_e[members] = g if site.room_r.max() > 1 else np.flatnonzero(site.node_r == g)
    return place_e
