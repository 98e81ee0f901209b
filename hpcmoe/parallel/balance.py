"""Which experts get copies, and where these sit, so that the busiest place of a stage has as little to do as can be.

A layer has `slots` >= experts, and every place holds some of them, consecutive ones. Rows of an expert are split evenly
among its copies: a slot of expert e has load_e / count_e (a copy's rows are whole, so it may get one more). What is
minimised is the load of the heaviest place, as DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB) states the
problem. With one slot per place `plan` is exact; with several, the question contains bin packing, and a greedy start
is improved by local search. Everything here is deterministic: all ranks that have the same numbers get the same answer.

Throughout: load_e, rows of each expert (any unit, >= 0); slots_of_place, how many slots each place has [r]; expert_s,
the expert in each slot, in the order of places; every expert is in at least one slot.
"""

from __future__ import annotations

import heapq

import numpy as np

from hpcmoe.parallel.seating import LEAST, Seating, greedy, place_of

ENOUGH = 1e-3  # relative: the search ends so near the lower bound
SHAKES = 500   # slots x further starts of the local search, about


# ---------------------------------------------------------------- measures
def rows_of_place(expert_s, load_e, slots_of_place) -> np.ndarray:
    """The load of each place: [r]."""
    load_e, expert_s = np.asarray(load_e, dtype=float), np.asarray(expert_s)
    share_e = load_e / np.maximum(np.bincount(expert_s, minlength=len(load_e)), 1)
    return np.bincount(place_of(slots_of_place), weights=share_e[expert_s], minlength=len(slots_of_place))


def heaviest(expert_s, load_e, slots_of_place) -> float:
    """The load of the heaviest place."""
    return float(rows_of_place(expert_s, load_e, slots_of_place).max())


def lower_bound(load_e, slots_of_place) -> float:
    """No choice of copies and seats makes the heaviest place lighter: it has at least the mean of all places, and some place
    has the heaviest slot. With one slot per place this is what `plan` reaches."""
    load_e = np.asarray(load_e, dtype=float)
    places, slots = len(slots_of_place), int(np.sum(slots_of_place))
    return float(max(load_e.sum() / places, (load_e / copies_of(load_e, slots, places)).max()))


def moved(old_s, new_s, slots_of_place) -> int:
    """How many slots of new_s hold an expert that their place did not hold before: weights that must travel."""
    place_s = place_of(slots_of_place)
    held = set(zip(place_s.tolist(), np.asarray(old_s).tolist()))
    return len(set(zip(place_s.tolist(), np.asarray(new_s).tolist())) - held)


# ---------------------------------------------------------------- how many copies
def copies_of(load_e, slots: int, most: int = 0) -> np.ndarray:
    """How many slots each expert gets [e], at least one, at most `most` (0: no limit): the heaviest slot is as light as can be.

    Each slot beyond the first ones goes to the expert whose slots are heaviest now. That is exact. Let T be the least
    possible load of the heaviest slot, count*_e a choice that reaches it, and say that the greedy one ends with load_e / count_e
    > T for some e. Then count_e < count*_e <= most, and since both sum to `slots`, count_f > count*_f >= 1 for some f. When
    f got its last slot its slots had load_f / (count_f - 1) <= load_f / count*_f <= T, but e's were heavier than T, and e
    had room for more: e should have got it.

    Raises ValueError where slots are fewer than experts, or more than `most` for each.
    """
    load_e = [float(x) for x in load_e]
    experts, most = len(load_e), most or slots
    if not experts <= slots <= experts * most:
        raise ValueError(f"slots = {slots}: expected {experts} to {experts * most} for {experts} experts with up to {most} copies")
    count_e = [1] * experts
    heap = [(-load, 1, e) for e, load in enumerate(load_e)]  # among equals: fewest copies, then the lower number
    heapq.heapify(heap)
    for _ in range(slots - experts):
        while count_e[heap[0][2]] == most:
            heapq.heappop(heap)
        e = heap[0][2]
        count_e[e] += 1
        heapq.heapreplace(heap, (-load_e[e] / count_e[e], count_e[e], e))
    return np.array(count_e, dtype=np.int64)


# ---------------------------------------------------------------- seats
def plan(load_e, slots_of_place) -> np.ndarray:
    """Copies and their seats together: expert_s [s].

    Exact with one slot per place. With several, copies_of is where the search starts: other numbers of copies may fit
    the places better than those whose heaviest slot is lightest. Tests find small cases within an eighth of the least,
    nearly all of them exact; of large ones, those with spare slots and eight or more slots per place are within 0.2 % of
    lower_bound, those with two slots per place within 15 %.
    Raises ValueError as copies_of does, with the places as the limit: two copies of an expert on one place are one too many.
    """
    slots_of_place = np.asarray(slots_of_place)
    count_e = copies_of(load_e, int(slots_of_place.sum()), len(slots_of_place))
    found = greedy(load_e, count_e, slots_of_place)
    if slots_of_place.max() > 1:
        _search(found, lower_bound(load_e, slots_of_place))
    return found.expert_s


def seat(load_e, count_e, slots_of_place) -> np.ndarray:
    """Seats for given numbers of copies: expert_s [s]; copies of an expert are at different places.

    One slot per place: the experts in order, then their further copies in order; every seating is as good. Several:
    heaviest slots first, each at the lightest place with room, then exchanges of two slots while they help.
    Raises ValueError where counts do not fill the slots, or an expert has more copies than there are places.
    """
    found = greedy(load_e, count_e, np.asarray(slots_of_place))
    while found.exchange():
        pass
    return found.expert_s


def _search(found: Seating, bound: float) -> None:
    """Local search, then again from near the best seating so far; ends early where little can be gained."""
    enough = bound * (1 + ENOUGH)
    found.descend(enough)
    rng, best_s, best = np.random.default_rng(0), found.expert_s.copy(), found.worst
    for _ in range(int(np.clip(SHAKES // len(best_s), 2, 50))):
        if best <= enough:
            break
        found.shake(rng)
        found.descend(enough)
        if found.worst <= best * (1 + LEAST):  # as good is gone on from too
            best_s, best = found.expert_s.copy(), found.worst
        else:
            found.take(best_s)


# ---------------------------------------------------------------- another load
def seat_again(expert_s, load_e, slots_of_place, worse: float = 0.0) -> np.ndarray:
    """A seating for another load that keeps what need not move: expert_s [s].

    Its heaviest place has at most 1 + worse times the load of a new plan's. One slot per place: no seating so light moves
    fewer weights (`moved`). Several: of those that were looked at (the old one; what local search makes of it; a new plan,
    its places dealt anew), the one that moves fewest. A place keeps an expert in the slot where it has it.
    """
    slots_of_place, old_s = np.asarray(slots_of_place), np.array(expert_s, dtype=np.int64)
    fresh_s = plan(load_e, slots_of_place)
    limit = heaviest(fresh_s, load_e, slots_of_place) * (1 + worse)
    if slots_of_place.max() == 1:
        return _fewest_changes(old_s, load_e, limit)
    near = Seating(load_e, old_s, slots_of_place)
    near.descend(limit)
    able = [_kept(old_s, x, slots_of_place) for x in (old_s, near.expert_s, fresh_s)
            if heaviest(x, load_e, slots_of_place) <= limit * (1 + LEAST)]
    return min(able, key=lambda new_s: (moved(old_s, new_s, slots_of_place), heaviest(new_s, load_e, slots_of_place)))


def _fewest_changes(old_s: np.ndarray, load_e, limit: float) -> np.ndarray:
    """One slot per place: every expert gets the copies that `limit` asks for, and slots change only for that; they are taken
    where that leaves the lightest slots."""
    load_e = np.asarray(load_e, dtype=float)
    need_e = np.maximum(1, np.ceil(load_e / limit * (1 - LEAST))).astype(int) if limit > 0 else np.ones(len(load_e), dtype=int)
    new_s, count_e = old_s.copy(), np.bincount(old_s, minlength=len(load_e))
    for e in np.flatnonzero(count_e < need_e).tolist():
        while count_e[e] < need_e[e]:
            after_f = np.where(count_e > need_e, load_e / np.maximum(count_e - 1, 1), np.inf)
            f = int(after_f.argmin())
            new_s[np.flatnonzero(new_s == f)[-1]] = e
            count_e[e] += 1
            count_e[f] -= 1
    return new_s


def _kept(old_s: np.ndarray, new_s: np.ndarray, slots_of_place: np.ndarray) -> np.ndarray:
    """new_s with its places dealt anew among those with equally many slots, most in common first; what a place keeps stays
    in its slot."""
    cuts = np.cumsum(slots_of_place)[:-1]
    old_r, new_r = ([part.tolist() for part in np.split(x, cuts)] for x in (old_s, new_s))
    experts = int(max(old_s.max(), new_s.max())) + 1
    old_re, new_re = (np.array([np.bincount(part, minlength=experts) > 0 for part in table], dtype=np.int64)
                      for table in (old_r, new_r))
    common_rr = 2 * (old_re @ new_re.T) + np.eye(len(slots_of_place), dtype=np.int64)  # among equals a place keeps its number
    gets, given = {}, set()
    for cell in np.argsort(-common_rr, axis=None, kind="stable").tolist():
        r, q = divmod(cell, len(slots_of_place))
        if r not in gets and q not in given and slots_of_place[r] == slots_of_place[q]:
            gets[r] = q
            given.add(q)
    return np.concatenate([_in_old_order(old_r[r], new_r[gets[r]]) for r in range(len(slots_of_place))])


def _in_old_order(old: list[int], new: list[int]) -> list[int]:
    """The experts of `new`; those that are in `old` too in the slots that they have there."""
    left, out = list(new), []
    for e in old:
        stays = e in left
        out.append(e if stays else None)
        if stays:
            left.remove(e)
    return [left.pop(0) if e is None else e for e in out]
