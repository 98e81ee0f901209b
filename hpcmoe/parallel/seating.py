"""Experts in slots of places: the greedy start, and the steps of the local search.

Names and what is minimised: balance.py. Rounding is the same on all machines: no product of matrices, sums in the order of slots.
"""

from __future__ import annotations

import numpy as np

LEAST = 1e-9  # relative: gains below it are rounding
STEPS = 400   # of one local search, at most
LIGHT = 16    # experts that are tried in a slot of the heaviest place


def place_of(slots_of_place) -> np.ndarray:
    """The place of each slot: [s]."""
    return np.repeat(np.arange(len(slots_of_place)), slots_of_place)


def greedy(load_e, count_e, slots_of_place: np.ndarray) -> "Seating":
    """Heaviest slots first, each at the lightest place with room and without that expert. Raises ValueError as
    balance.seat does."""
    count_e = np.asarray(count_e)
    places, slots, experts = len(slots_of_place), int(slots_of_place.sum()), np.arange(len(count_e))
    if count_e.min() < 1 or count_e.max() > places or count_e.sum() != slots:
        raise ValueError(f"counts {count_e.tolist()}: expected 1 to {places} each, {slots} in all")
    if slots_of_place.max() == 1:
        return Seating(load_e, np.concatenate([experts, np.repeat(experts, count_e - 1)]), slots_of_place)
    share_e = np.asarray(load_e, dtype=float) / count_e
    room_r, rows_r, holds_re = slots_of_place.copy(), np.zeros(places), np.zeros((places, len(experts)), dtype=bool)
    for e in np.argsort(-share_e, kind="stable").tolist():
        for _ in range(count_e[e]):
            fits_r = (room_r > 0) & ~holds_re[:, e]
            r = int(np.where(fits_r, rows_r, np.inf).argmin()) if fits_r.any() else _make_way(e, room_r, rows_r, holds_re, share_e)
            holds_re[r, e] = True
            room_r[r] -= 1
            rows_r[r] += share_e[e]
    return Seating(load_e, np.nonzero(holds_re)[1], slots_of_place)


def _make_way(e: int, room_r: np.ndarray, rows_r: np.ndarray, holds_re: np.ndarray, share_e: np.ndarray) -> int:
    """Where only places that hold e have room: moves a slot of a full place without e to one of them; that full place.

    There is such a slot: the full place has at most one slot less than the other, holds different experts in all of them, and
    e, which the other holds among fewer, is none of them.
    """
    p = int(np.where(room_r > 0, rows_r, np.inf).argmin())
    ways = [(max(rows_r[q] - share_e[g] + share_e[e], rows_r[p] + share_e[g]), q, g)
            for q in np.flatnonzero(~holds_re[:, e]).tolist() for g in np.flatnonzero(holds_re[q] & ~holds_re[p]).tolist()]
    _, q, g = min(ways)
    for r, sign in ((q, -1), (p, 1)):
        holds_re[r, g] = sign > 0
        room_r[r] -= sign
        rows_r[r] += sign * share_e[g]
    return q


class Seating:
    """A seating and what its cost is made of. n_re: copies of each expert at each place."""

    def __init__(self, load_e, expert_s, slots_of_place: np.ndarray):
        self.load_e, self.expert_s = np.asarray(load_e, dtype=float), np.array(expert_s, dtype=np.int64)
        self.place_s, self.places = place_of(slots_of_place), len(slots_of_place)
        self.take(self.expert_s)

    def take(self, expert_s: np.ndarray) -> None:
        """Another seating on the same places."""
        self.expert_s[...] = expert_s
        self.n_re = np.zeros((self.places, len(self.load_e)), dtype=np.int64)
        np.add.at(self.n_re, (self.place_s, self.expert_s), 1)
        self._weigh()

    def _weigh(self) -> None:
        self.count_e = np.bincount(self.expert_s, minlength=len(self.load_e))
        self.share_e = self.load_e / self.count_e
        self.rows_r = np.bincount(self.place_s, weights=self.share_e[self.expert_s], minlength=self.places)

    @property
    def worst(self) -> float:
        return float(self.rows_r.max())

    def put(self, slots, experts) -> None:
        """Other experts in these slots."""
        for s, e in zip(slots, experts):
            self.n_re[self.place_s[s], self.expert_s[s]] -= 1
            self.n_re[self.place_s[s], e] += 1
            self.expert_s[s] = e
        self._weigh()

    def descend(self, enough: float) -> None:
        """Exchanges while they help, else another number of copies; until the heaviest place is no heavier than `enough`."""
        for _ in range(STEPS):
            if self.worst <= enough or not (self.exchange() or self.recount()):
                break

    def exchange(self) -> bool:
        """The best exchange of a slot of the heaviest place with another place's, made if both end up lighter than it was."""
        h = int(self.rows_r.argmax())
        own, others = np.flatnonzero(self.place_s == h), np.flatnonzero(self.place_s != h)
        if not len(others):
            return False
        a, b, place_b = self.expert_s[own], self.expert_s[others], self.place_s[others]
        less_ab = self.share_e[a][:, None] - self.share_e[b][None]
        worst_ab = np.maximum(self.rows_r[h] - less_ab, self.rows_r[place_b] + less_ab)
        worst_ab[(self.n_re[h, b] > 0)[None] | (self.n_re[place_b[None], a[:, None]] > 0)] = np.inf  # twice on a place
        i, j = np.unravel_index(worst_ab.argmin(), worst_ab.shape)
        if worst_ab[i, j] >= self.rows_r[h] * (1 - LEAST):
            return False
        self.put((own[i], others[j]), (b[j], a[i]))
        return True

    def recount(self) -> bool:
        """The best change of one slot from an expert with several copies to another expert, made if it makes the heaviest
        place lighter: anyone's slot for an expert of that place, or its own slot for one whose copies are light."""
        h, slot_b = int(self.rows_r.argmax()), np.flatnonzero(self.count_e[self.expert_s] > 1)
        light_e = np.argsort(self.load_e / (self.count_e + 1), kind="stable")
        best = None, None, self.rows_r[h] * (1 - LEAST)
        for f in [*np.flatnonzero(self.n_re[h]).tolist(), *light_e[self.n_re[h, light_e] == 0][:LIGHT].tolist()]:
            able = slot_b[(self.expert_s[slot_b] != f) & (self.n_re[self.place_s[slot_b], f] == 0)]
            if not self.n_re[h, f]:
                able = able[self.place_s[able] == h]
            if len(able):
                worst_b = self._after(able, f)
                if worst_b.min() < best[2]:
                    best = able[worst_b.argmin()], f, worst_b.min()
        if best[0] is None:
            return False
        self.put(*zip(best[:2]))
        return True

    def _after(self, slot_b: np.ndarray, f: int) -> np.ndarray:
        """At most so heavy is the heaviest place if one of the slots held f instead: [b]. Places that hold f become lighter,
        the other places of the slot's expert e heavier."""
        e_b, place_b = self.expert_s[slot_b], self.place_s[slot_b]
        share_f, lighter_r = self.load_e[f] / (self.count_e[f] + 1), self.n_re[:, f] > 0
        rows_r = self.rows_r - np.where(lighter_r, self.share_e[f] - share_f, 0.0)
        more_e = np.where(self.count_e > 1, self.load_e / np.maximum(self.count_e - 1, 1) - self.share_e, 0.0)
        # of each expert's places the heaviest, and the heaviest but one
        order = np.lexsort((rows_r[self.place_s], self.expert_s))
        last_e = np.cumsum(self.count_e) - 1
        top_e, place_e = rows_r[self.place_s[order[last_e]]], self.place_s[order[last_e]]
        second_e = np.where(self.count_e > 1, rows_r[self.place_s[order[np.maximum(last_e - 1, 0)]]], -np.inf)
        others_b = np.where(place_e[e_b] == place_b, second_e[e_b], top_e[e_b]) + more_e[e_b]
        own_b = rows_r[place_b] - self.share_e[e_b] + share_f
        first, *rest = np.argsort(-rows_r, kind="stable")[:2]
        still_b = np.where(place_b == first, rows_r[rest[0]] if rest else -np.inf, rows_r[first])
        return np.maximum(np.maximum(others_b, own_b), still_b)

    def shake(self, rng) -> None:
        """Exchanges a few slots at random, and sometimes lets another expert have one."""
        for _ in range(int(rng.integers(1, 4))):
            a, b = rng.integers(len(self.expert_s), size=2)
            e, f, p, q = self.expert_s[a], self.expert_s[b], self.place_s[a], self.place_s[b]
            if e == f or self.n_re[p, f]:
                continue
            if self.count_e[e] > 1 and rng.random() < 0.5:
                self.put((a,), (f,))
            elif not self.n_re[q, e]:
                self.put((a, b), (f, e))
