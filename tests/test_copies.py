"""Rows dealt to copies of experts, against plain loops."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from hpcmoe.model.copies import Copies, in_order
from hpcmoe.model.route import route


@st.composite
def layers(draw):
    """(expert_s, experts, expert_tk): slots in any order, every expert somewhere; distinct choices of any number of tokens."""
    experts = draw(st.integers(1, 6))
    more = draw(st.lists(st.integers(0, experts - 1), max_size=8))
    expert_s = draw(st.permutations(list(range(experts)) + more))
    k = draw(st.integers(1, experts))
    tokens = draw(st.lists(st.permutations(range(experts)), max_size=24))
    return expert_s, experts, np.array([t[:k] for t in tokens], dtype=np.int64).reshape(len(tokens), k)


@given(layers(), st.integers(0, 9))
def test_rows_go_to_copies_by_turns_and_slots_are_sorted_by_destination(layer, leader):
    expert_s, experts, expert_tk = layer
    spread, copy_tk = Copies(expert_s, experts).spread(expert_tk, route(expert_tk, experts), leader)
    seen, rows = {e: 0 for e in range(experts)}, {s: [] for s in range(len(expert_s))}
    for t, chosen in enumerate(expert_tk.tolist()):
        for k, e in enumerate(chosen):
            slots = [s for s, held in enumerate(expert_s) if held == e]
            slot = slots[(seen[e] + leader) % len(slots)]
            seen[e] += 1
            rows[slot].append((t, k))
            assert copy_tk[t, k] == slot
    order = [pair for s in range(len(expert_s)) for pair in rows[s]]
    assert spread.n_send_e.tolist() == [len(rows[s]) for s in range(len(expert_s))]
    assert spread.token_s.tolist() == [t for t, _ in order]
    assert [spread.slot_tk[pair] for pair in order] == list(range(len(order)))


@given(layers(), st.integers(1, 5))
def test_copies_share_evenly_within_a_leader_and_over_leaders(layer, leaders):
    expert_s, experts, expert_tk = layer
    copies, n_e = Copies(expert_s, experts), np.bincount(expert_tk.reshape(-1), minlength=experts)
    rows = np.array([copies.rows_s(n_e, leader) for leader in range(leaders)])
    for e in range(experts):
        own = rows[:, np.array(expert_s) == e]
        assert (own.sum(axis=1) == n_e[e]).all() and (np.ptp(own, axis=1) <= 1).all()
        if leaders % own.shape[1] == 0:  # leaders with equal rows: what is left over falls on every copy as often
            assert np.ptp(own.sum(axis=0)) == 0


def test_slots_in_order_and_slots_without_an_expert():
    assert in_order(4, 6).tolist() == [0, 1, 2, 3, 0, 1]
    expert_tk = np.array([[1, 0], [2, 1]])
    plain = route(expert_tk, 3)
    assert Copies([0, 1, 2], 3).spread(expert_tk, plain, 1)[0] is plain
    for expert_s in ([0, 1], [0, 0, 1], [0, 1, 3]):
        with pytest.raises(ValueError, match="at least once"):
            Copies(expert_s, 3)
