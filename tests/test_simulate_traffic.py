"""Rows from each place to each: from routing against the engine's own plans, expected ones against the mean of draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.cluster import traffic
from hpcmoe.parallel.nodes import Nodes, parcels


def draw(rng, places, experts, k, most=6):
    """Choices of tokens of each place; some do not lead."""
    choices = [np.argsort(rng.random((rng.integers(0, most), experts)), axis=1)[:, :k] for _ in range(places)]
    return [None if rng.random() < 0.2 else c for c in choices]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_rows_from_routing(places, per_place, k, seed):
    """Flat: pair by pair. Hierarchical: each leader's parcels, by its plan, go to the forwarder and on, choice by choice."""
    rng = np.random.default_rng(seed)
    experts = places * per_place
    k = min(k, experts)
    owner_e, node_r = np.repeat(np.arange(places), per_place), np.sort(rng.integers(0, 3, places))
    chosen = draw(rng, places, experts, k)
    flat, between, within = (np.zeros((places, places)) for _ in range(3))
    for r, expert_tk in enumerate(chosen):
        if expert_tk is None:
            continue
        nodes = Nodes(node_r, r)
        made = parcels(expert_tk, np.ones(expert_tk.shape, np.float32), nodes.number_r[owner_e], nodes)
        for n, block in made.blocks():
            forwarder = nodes.forwarder(r, n)
            between[r, forwarder] += block.stop - block.start
            for e in made.expert_uk[block].ravel():
                if e >= 0:
                    within[forwarder, owner_e[e]] += 1
        for e in expert_tk.ravel():
            flat[r, owner_e[e]] += 1
            if node_r[owner_e[e]] == node_r[r]:
                within[r, owner_e[e]] += 1
    np.testing.assert_array_equal(traffic.flat_rows(chosen, owner_e), flat)
    hops = traffic.hierarchical_rows(chosen, owner_e, node_r)
    np.testing.assert_array_equal(hops.between_rs, between)
    np.testing.assert_array_equal(hops.within_rs, within)
    assert hops.within_rs.sum() == flat.sum()


@pytest.mark.parametrize("node_r, k", [([0, 0, 0, 1, 1, 2], 2), ([0, 0, 1, 1, 2, 2], 3), ([0] * 6, 1)])
def test_expected_rows_are_the_mean_of_draws(node_r, k):
    rng = np.random.default_rng(5)
    rows_r, experts_s, tokens = np.array([30, 0, 30, 30, 30, 10]), np.array([1, 1, 2, 1, 2, 1]), 3000
    owner_e = np.repeat(np.arange(6), experts_s)
    chosen = [np.argsort(rng.random((tokens, 8)), axis=1)[:, :k] if rows else None for rows in rows_r]
    scale = rows_r[:, None] / tokens
    np.testing.assert_allclose(traffic.even_flat_rows(rows_r, experts_s, k), traffic.flat_rows(chosen, owner_e) * scale, atol=0.03 * 30 * k)
    even, drawn = traffic.even_hierarchical_rows(rows_r, experts_s, k, node_r), traffic.hierarchical_rows(chosen, owner_e, node_r)
    np.testing.assert_allclose(even.between_rs, drawn.between_rs * scale, atol=0.03 * 30)
    assert even.within_rs.sum() == pytest.approx(k * rows_r.sum())
    assert traffic.even_flat_rows(rows_r, experts_s, k).sum() == pytest.approx(k * rows_r.sum())


def test_what_crosses_nodes_is_what_the_page_on_exchanges_says():
    """docs/exchange.md: R = L t k (1 - 1/N), H = L t (N - 1) (1 - C(E - E/N, k) / C(E, k)); R / H for 16 experts on 4 x 4."""
    node_r = np.arange(16) // 4
    other = node_r[:, None] != node_r
    for k, gain in ((2, 1.11), (4, 1.37), (8, 2.08)):
        flat = (traffic.even_flat_rows(np.full(16, 10), np.ones(16), k) * other).sum()
        assert flat == pytest.approx(16 * 10 * k * 3 / 4)
        once = traffic.even_hierarchical_rows(np.full(16, 10), np.ones(16, int), k, node_r).between_rs
        assert (once[~other] == 0).all() and flat / once.sum() == pytest.approx(gain, abs=0.005)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 50), st.integers(1, 8))
def test_sums_over_shards(rows, shards):
    """Each shard gets its share of the rows from all others, and gives its sum to all others."""
    scatter, gather = traffic.sum_rows(rows, shards)
    n_j = [len(range(rows)[j::shards]) for j in range(shards)]
    assert sorted(scatter.sum(axis=0)) == sorted(n * (shards - 1) for n in n_j)
    np.testing.assert_array_equal(gather, scatter.T)
    assert scatter.sum() == rows * (shards - 1) and (np.diag(scatter) == 0).all()
