"""Placements: cost, bounds and solvers against brute force over all placements and counts of single tokens."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from hpcmoe.cluster import exact, search
from hpcmoe.cluster.bound import busiest_rank, lower_bound, most_pairs
from hpcmoe.cluster.copies import as_slots, by_place
from hpcmoe.cluster.cost import Load, Prices, between_nodes, cost, fewest_visits, rank_rows, site, visits
from hpcmoe.cluster.machine import Machine
from hpcmoe.cluster.place import linear, round_robin, solve
from hpcmoe.parallel.balance import heaviest, plan
from hpcmoe.parallel.layout import Layout


def machine(node_of_rank, switch_n=None, bandwidth_n=None) -> Machine:
    nodes = max(node_of_rank) + 1
    return Machine("test", tuple(node_of_rank), switch_n or (0,) * nodes, bandwidth_n or (1e9,) * nodes, 1.5e9, 1e-6, 1e12, 1e12)


def draws(rng, tokens: int, experts: int, k: int) -> np.ndarray:
    """Choices [t, k] of tokens with favourite experts, which like to come together."""
    taste_ce = rng.gumbel(size=(4, experts)) * 2
    score_te = taste_ce[rng.integers(0, 4, tokens)] + rng.gumbel(size=(tokens, experts))
    return np.argsort(-score_te, axis=1)[:, :k]


def load_of(expert_tk, experts: int) -> Load:
    """By a plain loop over tokens."""
    p_e, q_ee = np.zeros(experts), np.zeros((experts, experts))
    for chosen in expert_tk:
        p_e[chosen] += 1 / len(expert_tk)
        for e, f in itertools.permutations(chosen, 2):
            q_ee[e, f] += 1 / len(expert_tk)
    return Load(p_e, q_ee, expert_tk.shape[1])


def all_placements(rooms) -> list:
    """Every assignment of experts to places that fills them, by brute force."""
    seats = [place for place, room in enumerate(rooms) for _ in range(room)]
    return [np.array(p) for p in sorted(set(itertools.permutations(seats)))]


def plain_cost(machine_, layout, load, place_e, row_bytes, row_flop) -> float:
    """The cost of a two-choice layer of a hierarchical exchange, link by link: no matrices."""
    node_r = list(machine_.node_of_rank)
    leaders = layout.leader_places(node_r, 0)[0]
    node_e = [node_r[r] for r in place_e]
    nodes = sorted(set(node_r))
    visit = {n: sum(load.p_e[e] for e in range(len(node_e)) if node_e[e] == n)
             - sum(load.q_ee[e, f] for e in range(len(node_e)) for f in range(e) if node_e[e] == node_e[f] == n) for n in nodes}
    flow = {(a, b): sum(node_r[r] == a for r in leaders) / len(leaders) * visit[b] for a in nodes for b in nodes if a != b}
    into = {n: sum(x for (_, b), x in flow.items() if b == n) / machine_.bandwidth_n[n] for n in nodes}
    out = {n: sum(x for (a, _), x in flow.items() if a == n) / machine_.bandwidth_n[n] for n in nodes}
    links = [*into.values(), *out.values()]
    switch = machine_.switch_n
    if len(set(switch)) > 1:
        for w in set(switch):
            links.append(sum(x for (a, b), x in flow.items() if switch[a] != w == switch[b]) / machine_.uplink)
            links.append(sum(x for (a, b), x in flow.items() if switch[a] == w != switch[b]) / machine_.uplink)
    rows = max(sum(load.p_e[e] for e in range(len(node_e)) if place_e[e] == r) for r in range(len(node_r)))
    seconds = 2 * row_bytes * (max(links) + sum(into.values()) / len(nodes))
    return seconds + rows * row_flop / machine_.rank_flop


CASES = [  # nodes of the ranks, experts, switch of each node, leaders
    ([0, 0, 1, 1], 4, None, "all"), ([0, 0, 0, 1, 1, 1], 6, None, "all"), ([0, 0, 1, 1, 2, 2], 6, None, "1"),
    ([0, 0, 0, 0, 1, 1], 6, None, "all"), ([0, 0, 1, 1], 7, None, "all"), ([0, 1, 2, 3], 6, (0, 0, 1, 1), "all"),
    ([0, 0, 1, 1, 2, 2, 3, 3], 8, None, "node"), ([0, 1, 0, 1, 2], 5, None, "3")]


@pytest.mark.parametrize("node_of_rank, experts, switch_n, leaders", CASES)
@pytest.mark.parametrize("row_flop", [0, 3e3])
def test_cost_bound_and_solvers_against_brute_force(node_of_rank, experts, switch_n, leaders, row_flop):
    """The cost is that of a plain loop; trying all finds the least; search is near it; no bound is above it."""
    rng = np.random.default_rng(experts + len(node_of_rank))
    layout, bandwidth = Layout(1, 1, len(node_of_rank), 1, leaders), tuple(1e9 * (1 + n % 2) for n in range(max(node_of_rank) + 1))
    where = machine(node_of_rank, switch_n, bandwidth if leaders == "3" else None)
    at = site(where, layout, 0, experts, Prices(100.0, row_flop, "hierarchical", 2))
    load = load_of(draws(rng, 200, experts, 2), experts)
    some = [rng.permutation(np.repeat(np.arange(len(at.room_r)), at.room_r)) for _ in range(20)]
    for place_e in some:
        assert cost(at, load, place_e) == pytest.approx(plain_cost(where, layout, load, place_e, 100.0, row_flop), rel=1e-12)
    costs = [cost(at, load, place_e) for place_e in (all_placements(at.room_r) if experts < 8 else node_placements(at))]
    best = min(costs)
    assert exact.possible(at)
    chosen = exact.solve(at, load, list(exact.partitions(at)))
    assert sorted(chosen.tolist()) == sorted(np.repeat(np.arange(len(at.room_r)), at.room_r).tolist())
    assert cost(at, load, chosen) == pytest.approx(best, rel=1e-12)
    assert lower_bound(at, load) <= best * (1 + 1e-9)
    searched = search.solve(at, load, [linear(layout, experts)])
    assert sorted(searched.tolist()) == sorted(chosen.tolist())
    assert best * (1 - 1e-12) <= cost(at, load, searched) <= 1.02 * best


def node_placements(at):
    """One expert per place: which node is all that matters."""
    rooms = np.bincount(at.node_r)
    for node_e in all_node_choices(tuple(rooms.tolist())):
        place_e = np.empty(len(at.node_r), dtype=int)
        for n in range(len(rooms)):
            place_e[node_e == n] = np.flatnonzero(at.node_r == n)
        yield place_e


def all_node_choices(rooms):
    def fill(left, head):
        if not any(left):
            yield np.array(head)
        for n, room in enumerate(left):
            if room:
                yield from fill(left[:n] + (room - 1,) + left[n + 1:], head + [n])
    yield from fill(rooms, [])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([(2, 2, 2), (3, 3), (1, 2, 3), (4, 2), (2, 2, 2, 1)]), st.integers(1, 4))
def test_pair_and_rank_bounds_hold_for_every_partition(seed, rooms, k):
    rng = np.random.default_rng(seed)
    experts = sum(rooms)
    load = load_of(draws(rng, 60, experts, min(k, experts)), experts)
    inside = [sum(load.q_ee[e, f] for e in range(experts) for f in range(e) if node_e[e] == node_e[f])
              for node_e in all_node_choices(rooms)]
    assert max(inside) <= most_pairs(load, np.array(rooms)) + 1e-9
    layout = Layout(1, 1, len(rooms))
    at = site(machine(list(range(len(rooms)))), layout, 0, experts, Prices(1.0, 1.0, "hierarchical", 2))
    if at.room_r.tolist() == sorted(rooms, reverse=True):
        rows = min(max(np.bincount(p, weights=load.p_e)) for p in all_placements(at.room_r)) if experts < 7 else np.inf
        assert busiest_rank(at, load) <= rows + 1e-9


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 8))
def test_visits_are_those_of_single_tokens(seed, nodes, k):
    """Exact for two choices, between the two bounds for more; a flat exchange counts every choice."""
    rng = np.random.default_rng(seed)
    expert_tk, node_e = draws(rng, 50, 8, k), rng.integers(0, nodes, 8)
    load = load_of(expert_tk, 8)
    true_n = np.array([np.mean([n in node_e[chosen] for chosen in expert_tk]) for n in range(nodes)])
    flat_n = np.array([np.mean([(node_e[chosen] == n).sum() for chosen in expert_tk]) for n in range(nodes)])
    most_n, least_n = visits(load, node_e, nodes, 2 / k), fewest_visits(load, node_e, nodes)
    np.testing.assert_allclose(visits(load, node_e, nodes, 0.0), flat_n, atol=1e-12)
    assert (least_n <= true_n + 1e-12).all() and (true_n <= most_n + 1e-12).all()
    if k <= 2:
        np.testing.assert_allclose(most_n, true_n, atol=1e-12)
        np.testing.assert_allclose(least_n, true_n, atol=1e-12)


def test_rows_between_nodes_of_uneven_leaders():
    """Every (token of a leader, node) once, counted in a loop over leaders that see the same tokens."""
    rng = np.random.default_rng(2)
    expert_tk, node_r = draws(rng, 80, 6, 2), [0, 0, 0, 1, 1, 2]
    at = site(machine(node_r), Layout(1, 1, 6, 1, "4"), 0, 6, Prices(1.0, 1.0, "hierarchical", 2))
    place_e = rng.permutation(6)
    flow = np.zeros((3, 3))
    for leader in range(4):
        for chosen in expert_tk:
            for n in {node_r[place_e[e]] for e in chosen} - {node_r[leader]}:
                flow[node_r[leader], n] += 1 / 4 / len(expert_tk)
    total, busiest = between_nodes(at, visits(load_of(expert_tk, 6), np.array(node_r)[place_e], 3, at.overlap))
    assert total == pytest.approx(flow.sum()) and busiest == pytest.approx(max(flow.sum(axis=0).max(), flow.sum(axis=1).max()))


def test_a_whole_model_of_64_ranks():
    """pp=4 ep=16, 4 ranks a node: a permutation per layer, never worse than linear or round robin, within the gap."""
    rng = np.random.default_rng(4)
    every = [load_of(draws(rng, 400, 16, 2), 16) for _ in range(4)]
    layout = Layout(1, 4, 16)
    found = solve(machine(list(np.repeat(np.arange(16), 4))), layout, every, Prices(8192.0, 1e8, "hierarchical", 2))
    for chosen, *plain, bound in zip(*(found.figures[n] for n in ("chosen", "linear", "round-robin")), found.bound_l):
        assert bound * (1 - 1e-12) <= chosen.seconds <= min(p.seconds for p in plain)
    assert all(sorted(row) == list(range(16)) for row in found.expert_ls.tolist())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([[0, 0, 1, 1], [0, 1, 1, 2], [0, 0, 0]]), st.integers(3, 8))
def test_copies_are_counted_as_single_tokens_would_go(seed, k, node_of_rank, spare):
    """The load by slot against a loop over tokens and all ways to take a copy of each of their experts; whole places that are
    exchanged cost what their slots do."""
    rng = np.random.default_rng(seed)
    expert_tk, places, experts = draws(rng, 12, 5, k), len(node_of_rank), 5
    layout = Layout(1, 1, places, replicas=spare)
    at = site(machine(node_of_rank), layout, 0, experts, Prices(100.0, 1e4, "hierarchical", max(k, 2)))
    load = load_of(expert_tk, experts)
    expert_s = plan(load.p_e, at.room_r)
    place_s = np.repeat(np.arange(places), at.room_r)
    slots_e = [np.flatnonzero(expert_s == e) for e in range(experts)]
    rows_s, both_ss = np.zeros(len(expert_s)), np.zeros((len(expert_s),) * 2)
    for chosen in expert_tk:
        ways = list(itertools.product(*(slots_e[e] for e in chosen)))
        for way in ways:
            rows_s[list(way)] += 1 / len(ways) / len(expert_tk)
            for a, b in itertools.permutations(way, 2):
                both_ss[a, b] += 1 / len(ways) / len(expert_tk)
    load_s = as_slots(load, expert_s)
    np.testing.assert_allclose(load_s.p_e, rows_s, atol=1e-12)
    np.testing.assert_allclose(load_s.q_ee, both_ss, atol=1e-12)
    assert rank_rows(load_s, place_s, places).max() == pytest.approx(heaviest(expert_s, load.p_e, at.room_r))
    by, whole = by_place(at, load_s, place_s)
    for _ in range(5):
        new_r = rng.permutation(places)
        visit_n = visits(load_s, at.node_r[new_r[place_s]], at.nodes, at.overlap)
        np.testing.assert_allclose(visits(whole, by.node_r[new_r], by.nodes, by.overlap), visit_n, atol=1e-12)


@pytest.mark.parametrize("experts, replicas, ep", [(6, 2, 8), (16, 4, 20), (16, 8, 12), (16, 16, 12), (16, 19, 12)])
def test_with_copies_balance_comes_first(experts, replicas, ep):
    """One and several slots per place, equal and unequal numbers of them: ranks are as balanced as by balance.plan, links no
    busier than with its places in order, and copies of one expert on different places."""
    rng = np.random.default_rng(replicas)
    every = [load_of(draws(rng, 300, experts, 2), experts) for _ in range(2)]
    layout = Layout(1, 2, ep, replicas=replicas)
    where, prices = machine([r // 4 for r in range(2 * layout.ep)]), Prices(8192.0, 1e6, "hierarchical", 2)
    found = solve(where, layout, every, prices)
    for layer, load in enumerate(every):
        at = site(where, layout, layer, experts, prices)
        expert_s, chosen = found.expert_ls[layer], found.figures["chosen"][layer]
        assert set(expert_s.tolist()) == set(range(experts)) and len(expert_s) == experts + replicas
        assert all(len(set(held)) == len(held) for held in np.split(expert_s, np.cumsum(at.room_r)[:-1]))
        planned_s, place_s = plan(load.p_e, at.room_r), np.repeat(np.arange(layout.ep), at.room_r)
        assert heaviest(expert_s, load.p_e, at.room_r) == pytest.approx(heaviest(planned_s, load.p_e, at.room_r), rel=1e-12)
        assert chosen.predicted.busiest_rank == pytest.approx(heaviest(expert_s, load.p_e, at.room_r), rel=1e-12)
        assert chosen.seconds == pytest.approx(cost(at, as_slots(load, expert_s), place_s), rel=1e-12)
        assert found.exact_l[layer] == (experts == 6)
        assert found.bound_l[layer] * (1 - 1e-12) <= chosen.seconds <= cost(at, as_slots(load, planned_s), place_s) * (1 + 1e-12)


def test_round_robin_deals_to_nodes_in_turn():
    at = site(machine([0, 0, 0, 1]), Layout(1, 1, 4), 0, 6, Prices(1.0, 1.0, "flat", 2))
    assert at.room_r.tolist() == [2, 2, 1, 1]
    assert at.node_r[round_robin(at)].tolist() == [0, 1, 0, 0, 0, 0]
    at = site(machine([0, 0, 1, 1]), Layout(1, 1, 4), 0, 8, Prices(1.0, 1.0, "flat", 2))
    assert round_robin(at).tolist() == [0, 2, 1, 3, 0, 2, 1, 3]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([([0, 0, 1, 1, 2, 2], 12), ([0, 1, 1, 1], 9), ([0, 0, 0, 0], 8), ([0, 1, 2, 3, 4], 5)]))
def test_an_exchange_costs_what_is_foreseen(seed, case):
    """Each candidate of the local search, made in full and priced anew; links into nodes never exceed all links."""
    node_of_rank, experts = case
    rng = np.random.default_rng(seed)
    layout = Layout(1, 1, len(node_of_rank), 1, str(rng.integers(1, len(node_of_rank) + 1)))
    at = site(machine(node_of_rank), layout, 0, experts, Prices(100.0, 1e4, "hierarchical", 3))
    load = load_of(draws(rng, 60, experts, 3), experts)
    start = rng.permutation(np.repeat(np.arange(len(at.room_r)), at.room_r))
    state = search.Search(at, load, start, np.zeros(experts, dtype=int))
    e = int(rng.integers(experts))
    leave_f, enter_f, rest_f, into_f = state._exchanges(e)
    for f in range(experts):
        moved = start.copy()
        moved[[e, f]] = moved[[f, e]]
        visit_n = visits(load, at.node_r[moved], at.nodes, at.overlap)
        link_l = at.link_ln @ visit_n
        assert rest_f[f] + link_l.max() == pytest.approx(cost(at, load, moved), rel=1e-9)
        assert into_f[f] == pytest.approx(link_l[:at.nodes].max(), rel=1e-9, abs=1e-18)
    assert cost(at, load, state.run()) <= cost(at, load, start) * (1 + 1e-12)


def test_a_machine_of_one_node_has_nothing_to_gain_between_nodes():
    rng = np.random.default_rng(1)
    every = [load_of(draws(rng, 100, 64, 4), 64)]
    found = solve(machine([0] * 16), Layout(1, 1, 16), every, Prices(100.0, 1e4, "hierarchical", 4))
    chosen, = found.figures["chosen"]
    assert chosen.predicted.hierarchical_between_nodes == 0.0
    assert chosen.predicted.busiest_rank <= 1.02 * 4 / 16 or chosen.predicted.busiest_rank <= 1.05 * every[0].p_e.max()
