"""What exchanges put on links, against matrices of every pair of ranks; and which replicas are alike."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.cluster import traffic
from hpcmoe.cluster.clusterfile import ClusterFile, InsideTable, MpiTable, NicTable, NodesTable, RankTable, SwitchTable
from hpcmoe.cluster.network import Network, together
from hpcmoe.parallel.layout import Layout
from hpcmoe.simulate.alike import alike
from hpcmoe.simulate.nodeways import NodeWays, visits
from hpcmoe.simulate.ways import Ways


def network_of(nodes, per_node, ranks, nics=1):
    c = ClusterFile("c", NodesTable(nodes, per_node), RankTable(1.0, 1.0), NicTable(1.0, 5.0, nics, node_gb_per_s=1.5), InsideTable(2.0, 4.0, 6.0),
                    MpiTable(0.5), (SwitchTable(2, oversubscription=2.0, latency_us=1.0), SwitchTable(nodes + nodes % 2, uplink_gb_per_s=1.0)))
    return Network(c, np.arange(ranks) // per_node)


def ways_of(layout, members=None, nodes=4, per_node=4, leaders=None):
    network = network_of(nodes, per_node, layout.size)
    leaders_p = leaders or layout.leader_places(network.node_r, 0)
    return Ways(network, layout, list(range(layout.dp)) if members is None else members, leaders_p, layout.slots(layout.ep))


def same(moved, exchange):
    leg, = moved.legs
    np.testing.assert_allclose(0 if leg.load_l is None else leg.load_l, exchange.load_l, rtol=1e-9, atol=1e-6)
    assert (moved.host_s, leg.latency_s) == (pytest.approx(exchange.host_s), pytest.approx(exchange.latency_s))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.sampled_from([(1, 1, 4, 4), (2, 2, 2, 2), (1, 2, 8, 1), (4, 1, 4, 1), (2, 1, 3, 2)]), st.booleans())
def test_flat_exchanges_are_the_sum_of_all_pairs(seed, sizes, back):
    """Of each replica and tensor shard; and each place's rows by where they go."""
    layout, rng = Layout(*sizes), np.random.default_rng(seed)
    ways, stage = ways_of(layout), layout.pp - 1
    rows_r = rng.integers(0, 5, layout.ep)
    rows_s = rng.multinomial(2 * rows_r.sum(), np.full(layout.ep, 1 / layout.ep))
    rows_rs = np.outer(rows_r, rows_s / max(1, rows_r.sum()))
    if back:
        rows_rs = rows_rs.T
    columns = [layout.column(dp, stage, shard) for dp in range(layout.dp) for shard in range(layout.tp)]
    moved = ways.rows(stage, tuple(rows_r.tolist()), tuple(rows_s.tolist()), 100.0, back)
    same(moved, together([ways.network.matrix(ranks, 100.0 * rows_rs) for ranks in columns]))
    node_r = ways.network.node_r[columns[0]]
    near, own = node_r[:, None] == node_r, np.eye(layout.ep, dtype=bool)
    for found, where in ((moved.own_r, own), (moved.intra_r, near & ~own), (moved.inter_r, ~near)):
        np.testing.assert_allclose(found, (rows_rs * where).sum(axis=1), atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999))
def test_pairs_are_a_matrix_with_few_entries(seed):
    rng = np.random.default_rng(seed)
    network = network_of(4, 4, 16, nics=2)
    pairs, bytes_rr = defaultdict(float), np.zeros((16, 16))
    for _ in range(rng.integers(0, 20)):
        pairs[tuple(rng.integers(0, 16, 2).tolist())] = float(rng.integers(0, 3))
    for (a, b), n in pairs.items():
        bytes_rr[a, b] = n
    a, b = (np.array([p[i] for p in pairs], dtype=int) for i in (0, 1))
    found, expected = network.pairs(a, b, list(pairs.values())), network.matrix(np.arange(16), bytes_rr)
    np.testing.assert_allclose(found.load_l, expected.load_l)
    assert (found.host_s, found.latency_s) == (pytest.approx(expected.host_s), expected.latency_s)


@pytest.mark.parametrize("per_node, leaders", [(4, None), (2, [[0, 2, 5]]), (3, [[0, 1, 2, 3]])])
@pytest.mark.parametrize("back", [False, True])
def test_hierarchical_hops_are_those_of_even_choices(per_node, leaders, back):
    """Against traffic.even_hierarchical_rows, itself held against the engine's plans: 8 places of one expert, two choices."""
    layout = Layout(1, 1, 8, 1)
    ways = ways_of(layout, nodes=4, per_node=per_node, leaders=leaders)
    rows_r = np.zeros(8, dtype=int)
    rows_r[ways.leaders_p[0]] = 12
    total = int(rows_r.sum())
    even = NodeWays(ways, np.full((1, 8), 1 / 8), list(range(8)), 2, lambda nbytes: 0.0)
    moved = even.rows(0, 0, tuple(rows_r.tolist()), (total * 2 // 8,) * 8, 100.0, back)
    hops = traffic.even_hierarchical_rows(rows_r, np.ones(8, dtype=int), 2, ways.network.node_r)
    between = hops.between_rs * (100.0 if back else 100.0 + 16), hops.between_rs
    within = hops.within_rs * 100.0, hops.within_rs
    for one, (bytes_rs, rows_rs) in zip(moved, [within, between] if back else [between, within]):
        if back:
            bytes_rs, rows_rs = bytes_rs.T, rows_rs.T
        same(one, ways.network.matrix(np.arange(8), bytes_rs))
        np.testing.assert_allclose(one.own_r + one.intra_r + one.inter_r, rows_rs.sum(axis=1), atol=1e-9)
    crossing = moved[-1] if back else moved[0]
    assert crossing.inter_r.sum() == pytest.approx(hops.between_rs.sum()) and crossing.intra_r.sum() == 0


def test_visits_of_uneven_experts():
    """One expert takes nearly every first choice: its node is needed by all, the others share the second ones. Even ones by the formula."""
    node_e = np.array([0, 0, 1, 1])
    np.testing.assert_allclose(visits(np.full(4, 0.25), 2, node_e, 2), [1 - 1 / 6] * 2)
    found = visits(np.array([0.997, 0.001, 0.001, 0.001]), 2, node_e, 2)
    assert found[0] > 0.99 and found[1] == pytest.approx(2 / 3, abs=0.02)


def test_sums_of_shards_are_two_exchanges_of_parts():
    layout = Layout(1, 1, 2, 4)
    ways = ways_of(layout, per_node=2)
    moved = ways.sums(0, (7, 0), 10.0)
    ranks = np.arange(4)
    scatter, gather = traffic.sum_rows(7, 4)
    for leg, part in zip(moved.legs, (scatter, gather)):
        np.testing.assert_allclose(leg.load_l, ways.network.matrix(ranks, part * 10.0).load_l)
    assert 4 * moved.intra_r[0] == pytest.approx(2 * 7 * 3 / 3) and 4 * moved.inter_r[0] == pytest.approx(2 * 7 * 3 * 2 / 3)


# ---------------------------------------------------------------- replicas
def test_which_replicas_are_alike():
    """Three replicas of two ranks on nodes of four: two share a node, the third is alone. Six of different work: a pair's fellows tell."""
    def groups(dp, per_node, work, pp=1, ep=2):
        layout = Layout(dp, pp, ep)
        return alike(layout, network_of(8, per_node, layout.size), work)
    assert groups(4, 4, ["a"] * 4) == [[0, 1, 2, 3]]
    assert groups(3, 4, ["a"] * 3) == [[0, 1], [2]]
    assert groups(2, 2, ["a", "b"]) == [[0], [1]]
    assert groups(4, 2, ["a"] * 4) == [[0, 1, 2, 3]]
    assert groups(8, 4, list("abaaabaa")) == [[0, 4], [1, 5], [2, 3, 6, 7]]  # switches of two nodes: all of them see the same
    assert groups(8, 4, list("abaaaaaa")) == [[0], [1], [2, 3], [4, 5, 6, 7]]  # beside (0, 1) on a switch, and on the other one
    assert groups(4, 4, ["a"] * 4, ep=3) == [[0], [1], [2], [3]]  # ranks 2 and 5 lie on their nodes otherwise


def test_alike_are_replicas_whose_links_are_shared_alike():
    """Replicas of three ranks on nodes of four, an adapter for two ranks: where one shares its last rank's adapter with another's first rank,
    it is not as one that shares it with another's last."""
    network = network_of(8, 4, 24, nics=2)
    found = alike(Layout(8, 1, 3), network, ["a"] * 8)
    table = {}  # replica -> for each of its adapters, who is on it
    nic = next(kind for kind in network.kinds if kind.name == "adapter out")
    for dp in range(8):
        table[dp] = [sorted(r % 3 for r in range(24) if nic.link_r[r] == nic.link_r[mine]) for mine in range(3 * dp, 3 * dp + 3)]
    assert sorted(dp for members in found for dp in members) == list(range(8)) and len(found) > 1
    for members in found:
        assert all(table[dp] == table[members[0]] for dp in members)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999))
def test_replicas_that_are_alike_carry_alike(seed):
    """Of a group each member's exchange alone has the same loads, link by link in order of size."""
    rng = np.random.default_rng(seed)
    layout = Layout(int(rng.integers(1, 6)), 1, int(rng.integers(1, 5)))
    network = network_of(8, 4, layout.size)
    for members in alike(layout, network, ["a"] * layout.dp):
        rows_rs = rng.random((layout.ep, layout.ep))
        loads = [np.sort(network.matrix(layout.column(dp, 0), rows_rs).load_l) for dp in members]
        for load in loads[1:]:
            np.testing.assert_allclose(load, loads[0])
