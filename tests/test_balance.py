"""Copies of experts and their seats: against brute force over all of them on small cases, against the lower bound on large ones."""

import functools
import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from hpcmoe.parallel.balance import copies_of, heaviest, lower_bound, moved, plan, rows_of_place, seat, seat_again
from hpcmoe.parallel.layout import share


def rooms_of(slots: int, places: int) -> list[int]:
    return [len(share(slots, places, place)) for place in range(places)]


def compositions(slots: int, experts: int):
    """All counts >= 1 of so many experts that sum to slots."""
    for cuts in itertools.combinations(range(1, slots), experts - 1):
        yield np.diff([0, *cuts, slots])


@functools.lru_cache(maxsize=None)
def all_seatings(experts: int, rooms: tuple):
    """n_re of every way to hold different experts on each place, all of them somewhere: [choice, r, e]."""
    sets = [np.array([[e in chosen for e in range(experts)] for chosen in itertools.combinations(range(experts), room)])
            for room in rooms]
    index = np.array(list(itertools.product(*(range(len(s)) for s in sets))))
    n_cre = np.stack([s[index[:, r]] for r, s in enumerate(sets)], axis=1).astype(int)
    return n_cre[(n_cre.sum(axis=1) > 0).all(axis=1)]


def worst_of(n_cre, load_e) -> np.ndarray:
    return (n_cre * (load_e / n_cre.sum(axis=1))[:, None]).sum(axis=2).max(axis=1)


def plain_worst(expert_s, load_e, rooms) -> float:
    """The heaviest place by a plain loop over slots."""
    expert_s, rows = list(expert_s), []
    for room in rooms:
        mine, expert_s_rest = expert_s[sum(rooms[:len(rows)]):][:room], expert_s
        rows.append(sum(load_e[e] / expert_s_rest.count(e) for e in mine))
    return max(rows)


def check_sound(expert_s, experts: int, rooms) -> None:
    """Every expert is somewhere, none twice on a place."""
    assert len(expert_s) == sum(rooms) and set(np.asarray(expert_s).tolist()) == set(range(experts))
    for held in np.split(np.asarray(expert_s), np.cumsum(rooms)[:-1]):
        assert len(set(held.tolist())) == len(held)


loads = st.lists(st.one_of(st.integers(0, 30), st.floats(0, 1000)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=100)
@given(loads, st.integers(0, 4), st.integers(2, 9))
def test_copies_are_the_best_of_all(load_e, more, most):
    """Against all compositions, with and without a limit of copies; by heap order alone this is no tautology."""
    load_e, slots = np.array(load_e, dtype=float), len(load_e) + more
    every = np.array(list(compositions(slots, len(load_e))))
    count_e = copies_of(load_e, slots)
    assert count_e.min() >= 1 and count_e.sum() == slots
    assert (load_e / count_e).max() == pytest.approx((load_e / every).max(axis=1).min(), rel=1e-12)
    able = every[(every <= most).all(axis=1)]
    if len(able):
        count_e = copies_of(load_e, slots, most)
        assert count_e.max() <= most and (load_e / count_e).max() == pytest.approx((load_e / able).max(axis=1).min(), rel=1e-12)
    else:
        with pytest.raises(ValueError, match=f"slots = {slots}"):
            copies_of(load_e, slots, most)


@settings(deadline=None, max_examples=60)
@given(loads, st.integers(0, 4))
def test_one_slot_per_place_is_exact(load_e, more):
    load_e, rooms = np.array(load_e, dtype=float), [1] * (len(load_e) + more)
    best = min((load_e / count_e).max() for count_e in compositions(len(rooms), len(load_e)))
    found = plan(load_e, rooms)
    assert found[:len(load_e)].tolist() == list(range(len(load_e)))  # experts in order, then copies
    assert heaviest(found, load_e, rooms) == pytest.approx(best, rel=1e-12) == lower_bound(load_e, rooms)
    assert heaviest(found, load_e, rooms) == pytest.approx(plain_worst(found, load_e, rooms), rel=1e-12)


@settings(deadline=None, max_examples=30, derandomize=True)  # the bounds are measured, not proved
@given(loads, st.integers(1, 4), st.integers(0, 3), st.randoms(use_true_random=False))
def test_several_slots_per_place_are_near_the_best(load_e, places, more, random):
    """Against every seating of every choice of copies: at most an eighth above the least, no bound above it."""
    load_e, experts = np.array(load_e, dtype=float), len(load_e)
    rooms = rooms_of(experts + more, places)
    assume(min(rooms) >= 1 and max(rooms) <= experts)
    every = all_seatings(experts, tuple(rooms))
    best = worst_of(every, load_e).min()
    found = plan(load_e, rooms)
    check_sound(found, experts, rooms)
    assert heaviest(found, load_e, rooms) == pytest.approx(plain_worst(found, load_e, rooms), rel=1e-12)
    assert best * (1 - 1e-9) <= heaviest(found, load_e, rooms) <= 1.125 * best
    assert lower_bound(load_e, rooms) <= best * (1 + 1e-9)
    count_e = np.bincount(found, minlength=experts)
    same = every[(every.sum(axis=1) == count_e).all(axis=1)]
    seated = seat(load_e, count_e, rooms)
    check_sound(seated, experts, rooms)
    assert np.bincount(seated, minlength=experts).tolist() == count_e.tolist()
    assert heaviest(seated, load_e, rooms) <= 1.34 * worst_of(same, load_e).min() + 1e-9  # 4/3: Graham's, of longest first

    other_e = np.array(random.sample(list(load_e), experts))
    for worse in (0.0, 0.2):
        again = seat_again(found, other_e, rooms, worse)
        check_sound(again, experts, rooms)
        assert heaviest(again, other_e, rooms) <= heaviest(plan(other_e, rooms), other_e, rooms) * (1 + worse) * (1 + 1e-6)
    assert (seat_again(found, load_e, rooms) == found).all()


def test_distance_from_the_best_in_the_mean():
    """What the bound above leaves out: nearly all small cases are solved exactly."""
    rng, gaps = np.random.default_rng(5), []
    for case in range(60):
        experts, places = int(rng.integers(3, 7)), int(rng.integers(2, 5))
        rooms = rooms_of(int(rng.integers(max(experts, places), 9)), places)
        if max(rooms) <= experts:
            load_e = rng.pareto(1.2, experts) if case % 2 else rng.integers(0, 20, experts) + 1.0
            gaps.append(heaviest(plan(load_e, rooms), load_e, rooms) / worst_of(all_seatings(experts, tuple(rooms)), load_e).min() - 1)
    assert len(gaps) > 40 and np.mean(gaps) < 0.005 and np.mean(np.array(gaps) > 1e-9) < 0.1


@settings(deadline=None, max_examples=40)
@given(loads, st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.5]), st.randoms(use_true_random=False))
def test_one_slot_per_place_moves_as_few_weights_as_can_be(load_e, more, worse, random):
    """Against all seatings: none so light moves fewer."""
    load_e, experts = np.array(load_e, dtype=float), len(load_e)
    assume(experts <= 4)
    rooms = [1] * (experts + more)
    old_s = np.array(random.sample([*range(experts), *(random.randrange(experts) for _ in range(more))], len(rooms)))
    every = [s for s in itertools.product(range(experts), repeat=len(rooms)) if len(set(s)) == experts]
    limit = min(heaviest(s, load_e, rooms) for s in every) * (1 + worse)
    fewest = min(moved(old_s, s, rooms) for s in every if heaviest(s, load_e, rooms) <= limit * (1 + 1e-12))
    again = seat_again(old_s, load_e, rooms, worse)
    check_sound(again, experts, rooms)
    assert heaviest(again, load_e, rooms) <= limit * (1 + 1e-8)
    assert moved(old_s, again, rooms) == fewest == (again != old_s).sum()


def test_moved_counts_weights_that_a_place_did_not_hold():
    assert moved([0, 1, 2, 3], [1, 0, 2, 3], [2, 2]) == 0
    assert moved([0, 1, 2, 3], [0, 2, 1, 3], [2, 2]) == 2
    assert moved([0, 1, 2, 0], [0, 1, 2, 1], [1, 1, 1, 1]) == 1


@pytest.mark.parametrize("rooms", [[3, 3, 3], [2, 2, 2, 2], [4, 3, 3]])
@pytest.mark.parametrize("seed", range(4))
def test_copies_find_different_places_even_where_the_lightest_have_them(rooms, seed):
    """As many copies as places: the last ones find room only on places that hold them already."""
    rng = np.random.default_rng(seed)
    slots, places = sum(rooms), len(rooms)
    count_e = np.array([places] * (slots // places - 1) + [1] * (slots - places * (slots // places - 1)))
    load_e = rng.permutation(len(count_e)) * count_e + rng.random(len(count_e))
    check_sound(seat(load_e, count_e, rooms), len(count_e), rooms)


def test_counts_that_do_not_fit_are_refused():
    for count_e, rooms in (([1, 1], [1, 1, 1]), ([3, 1], [2, 2]), ([2, 0], [1, 1])):
        with pytest.raises(ValueError, match="counts"):
            seat([1.0, 2.0], count_e, rooms)
    with pytest.raises(ValueError, match="slots = 5"):
        plan([1.0, 2.0], [3, 2])


@pytest.mark.parametrize("experts, slots, places, gap", [
    (256, 256, 32, 1.08), (256, 288, 32, 1.002), (256, 288, 288, 1.0), (256, 320, 40, 1.002), (512, 1024, 1024, 1.0),
    (512, 1024, 512, 1.15), (512, 1024, 16, 1.002), (512, 640, 4, 1.002), (160, 168, 8, 1.002)])
def test_large_stages_come_near_the_bound(experts, slots, places, gap):
    """With no copies, or two slots per place, little can be chosen, and the bound knows nothing of packing."""
    rng, rooms = np.random.default_rng(slots), rooms_of(slots, places)
    load_e = rng.permutation(np.arange(1.0, experts + 1) ** -1.0) if slots % 3 else rng.lognormal(0, 1, experts)
    found = plan(load_e, rooms)
    check_sound(found, experts, rooms)
    assert heaviest(found, load_e, rooms) <= gap * lower_bound(load_e, rooms) * (1 + 1e-9)
    assert rows_of_place(found, load_e, rooms).sum() == pytest.approx(load_e.sum())
    drifted = load_e * rng.uniform(0.9, 1.1, experts)
    again, fresh = seat_again(found, drifted, rooms, 0.05), plan(drifted, rooms)
    check_sound(again, experts, rooms)
    assert heaviest(again, drifted, rooms) <= 1.05 * heaviest(fresh, drifted, rooms) * (1 + 1e-6)
    assert moved(found, again, rooms) <= moved(found, fresh, rooms)


def test_a_whole_model_is_planned_in_a_moment():
    """61 layers of 256 experts; well under a second of an idle core; the limit leaves room for a busy machine."""
    rng, rooms = np.random.default_rng(0), rooms_of(288, 32)
    start = time.process_time()
    found = [plan(rng.lognormal(0, 1, 256), rooms) for _ in range(61)]
    assert time.process_time() - start < 6
    assert len({tuple(f.tolist()) for f in found}) == 61
