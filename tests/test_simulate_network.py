"""The network model: links of a cluster by a plain loop, closed forms, max-min fair sharing and its laws."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hpcmoe.cluster.clusterfile import ClusterFile, InsideTable, MpiTable, NicTable, NodesTable, RankTable, SwitchTable
from hpcmoe.cluster.fair import Start, Wire, distinct_links, ends, fair_rates
from hpcmoe.cluster.network import Network, together
from hpcmoe.errors import UserError

PORT, NIC = 100e9, 10e9  # bytes/s


def cluster(nodes=4, per_node=4, nics=4, switch=(), inside=None, **nic) -> ClusterFile:
    return ClusterFile("test", NodesTable(nodes, per_node), RankTable(1.0, 1.0), NicTable(NIC / 1e9, 2.0, nics, **nic),
                       inside or InsideTable(1.0, PORT / 1e9), MpiTable(0.5), switch)


def one_pair(c: ClusterFile, r: int, s: int) -> list[tuple]:
    """(kind, number) of the links that a message from rank r to rank s crosses, rule by rule."""
    size = c.nodes.ranks_per_node
    a, b = r // size, s // size
    if r == s:
        return []
    if a == b:
        links = [("port out", r), ("port in", s)] if c.inside.rank_gb_per_s else []
        return links + [("shared memory", a)] * bool(c.inside.node_gb_per_s)
    share = size // c.nic.per_node  # ranks on an adapter
    links = [("adapter out", r // share), ("adapter in", s // share)]
    if c.nic.rank_gb_per_s:
        links += [("way to adapter out", r), ("way to adapter in", s)]
    if c.nic.node_gb_per_s:
        links += [("node out", a), ("node in", b)]
    for i, level in enumerate(c.switch):
        if a // level.nodes != b // level.nodes:
            links += [(f"switch level {i} out", a // level.nodes), (f"switch level {i} in", b // level.nodes)]
    return links


def loads(network: Network, load_l) -> dict:
    """(kind, number) -> bytes, of links that carry any."""
    return {(k.name, i): load_l[k.first + i] for k in network.kinds for i in range(k.count) if load_l[k.first + i]}


LEVELS = ((), (SwitchTable(2, 30.0),), (SwitchTable(1, oversubscription=2.0), SwitchTable(2, 25.0, latency_us=3.0)))
clusters = st.builds(cluster, nodes=st.integers(1, 5), per_node=st.just(4), nics=st.sampled_from([1, 2, 4]), switch=st.sampled_from(LEVELS),
                     inside=st.sampled_from([InsideTable(1.0, 100.0), InsideTable(1.0, None, 50.0), InsideTable(1.0, 70.0, 200.0, 0.5)]),
                     rank_gb_per_s=st.sampled_from([None, 8.0]), node_gb_per_s=st.sampled_from([None, 15.0]))


# ---------------------------------------------------------------- bytes on links
@settings(deadline=None, max_examples=80)
@given(clusters, st.integers(0, 2**32 - 1))
def test_loads_are_those_of_a_loop_over_pairs(c, seed):
    rng = np.random.default_rng(seed)
    network, ranks = Network(c), rng.permutation(c.ranks)[:rng.integers(1, c.ranks + 1)]
    bytes_rr = rng.integers(0, 1000, (len(ranks),) * 2) * (rng.random((len(ranks),) * 2) < 0.7)
    expected, messages = Counter(), Counter()
    far = 0.0
    for i, r in enumerate(ranks):
        for j, s in enumerate(ranks):
            if i != j and bytes_rr[i, j]:
                expected.update({link: int(bytes_rr[i, j]) for link in one_pair(c, r, s)})
                messages.update([r, s])
                a, b = r // 4, s // 4
                hops = sum(level.latency_us for level in c.switch if a // level.nodes != b // level.nodes)
                far = max(far, 1.0 if a == b else 2.0 + hops)
    made = network.matrix(ranks, bytes_rr)
    assert loads(network, made.load_l) == pytest.approx(dict(expected))
    assert made.host_s == pytest.approx(0.5e-6 * max(messages.values(), default=0))
    assert made.latency_s == pytest.approx(far * 1e-6)


@settings(deadline=None, max_examples=80)
@given(clusters, st.integers(0, 2**32 - 1))
def test_an_outer_product_is_its_matrix(c, seed):
    rng = np.random.default_rng(seed)
    network, ranks = Network(c), rng.permutation(c.ranks)[:rng.integers(1, c.ranks + 1)]
    send_r, share_r = (rng.random(len(ranks)) * (rng.random(len(ranks)) < 0.8) for _ in range(2))
    quick, plain = network.product(ranks, send_r, share_r), network.matrix(ranks, np.outer(send_r, share_r))
    np.testing.assert_allclose(quick.load_l, plain.load_l, atol=1e-12)
    assert (quick.host_s, quick.latency_s) == pytest.approx((plain.host_s, plain.latency_s))


def test_ranks_that_lie_otherwise():
    """Ranks dealt to the nodes in turn: rank 5 is the second on node 1 of 4, and takes its second port and adapter."""
    c = cluster(nics=2)
    network = Network(c, [r % 4 for r in range(16)])
    bytes_rr = np.zeros((16, 16))
    bytes_rr[5, 2] = 7.0
    made = loads(network, network.matrix(range(16), bytes_rr).load_l)
    assert made == {("adapter out", 1 * 2 + 0): 7.0, ("adapter in", 2 * 2 + 0): 7.0}
    bytes_rr[5, 2], bytes_rr[13, 9] = 0, 3.0  # both on node 1: the fourth and the third there
    assert loads(network, network.matrix(range(16), bytes_rr).load_l) == {("port out", 13): 3.0, ("port in", 9): 3.0}


@pytest.mark.parametrize("node_of_rank, words", [([0, 1, 4], "5 nodes of up to 1 "), ([0, 0, 0, 0, 0], "1 nodes of up to 5 ranks")])
def test_ranks_that_the_cluster_has_no_room_for_are_refused(node_of_rank, words):
    with pytest.raises(UserError, match=f"test: {words}.*nodes.count = 4"):
        Network(cluster(), node_of_rank)


# ---------------------------------------------------------------- closed forms
def uniform(network, ranks, nbytes):
    """Each rank sends so many bytes to each other."""
    return network.product(ranks, np.full(len(ranks), nbytes), np.ones(len(ranks)))


def test_a_single_message():
    network = Network(cluster(switch=(SwitchTable(2, 30.0, latency_us=3.0),)))
    bytes_rr = np.zeros((16, 16))
    bytes_rr[0, 1] = 1e6
    assert network.seconds(network.matrix(range(16), bytes_rr)) == pytest.approx(0.5e-6 + 1e-6 + 1e6 / PORT)
    bytes_rr = np.roll(bytes_rr, 4, axis=1)  # to rank 5, on the next node, same switch
    assert network.seconds(network.matrix(range(16), bytes_rr)) == pytest.approx(0.5e-6 + 2e-6 + 1e6 / NIC)
    bytes_rr = np.roll(bytes_rr, 4, axis=1)  # to rank 9, on another switch
    assert network.seconds(network.matrix(range(16), bytes_rr)) == pytest.approx(0.5e-6 + 5e-6 + 1e6 / NIC)


def test_incast():
    """All send to one rank: its adapter takes what comes from other nodes, one message after the other at the host."""
    network = Network(cluster())
    bytes_rr = np.zeros((16, 16))
    bytes_rr[:, 3] = 1e6
    made = network.matrix(range(16), bytes_rr)
    assert network.seconds(made) == pytest.approx(15 * 0.5e-6 + 2e-6 + 12e6 / NIC)
    busiest = network.busiest(made.load_l)
    assert (busiest.kind, busiest.number, busiest.nbytes) == ("adapter in", 3, 12e6)
    assert network.seconds(uniform(network, [3], 1e6)) == 0 and network.busiest(uniform(network, [3], 1e6).load_l).kind == "none"


@pytest.mark.parametrize("nics", [1, 2, 4])
def test_uniform_all_to_all(nics):
    """P = 16 ranks on nodes of S = 4: (P - S) rows leave each rank, and the ranks of an adapter share it."""
    network, b = Network(cluster(nics=nics)), 1e5
    made = uniform(network, range(16), b)
    assert network.seconds(made) == pytest.approx(30 * 0.5e-6 + 2e-6 + 12 * b * (4 // nics) / NIC)
    assert network.seconds(uniform(network, range(4), b)) == pytest.approx(6 * 0.5e-6 + 1e-6 + 3 * b / PORT)


def test_uniform_all_to_all_over_oversubscribed_switches():
    """Two nodes of 4 x 10 GB/s below a switch, 4 : 1: 20 GB/s for the 8 x 8 messages that leave it."""
    network, b = Network(cluster(switch=(SwitchTable(2, oversubscription=4.0),))), 1e5
    busiest = network.busiest(uniform(network, range(16), b).load_l)
    assert busiest.kind.startswith("switch level 0") and busiest.seconds == pytest.approx(64 * b / 20e9)


def test_skewed_all_to_all():
    """One rank's experts take a share h of all rows, the others share the rest: its adapter gets 12 h rows of every sender."""
    network, h, rows = Network(cluster()), 0.4, 1e6
    share_r = np.full(16, (1 - h) / 15)
    share_r[6] = h
    made = network.product(range(16), np.full(16, rows), share_r)
    assert network.seconds(made) == pytest.approx(30 * 0.5e-6 + 2e-6 + 12 * h * rows / NIC)
    assert network.busiest(made.load_l)[:2] == ("adapter in", 6)


@settings(deadline=None, max_examples=30)
@given(clusters, st.floats(0.1, 10), st.integers(0, 2**32 - 1))
def test_scaling(c, factor, seed):
    """Bytes x f: time on the links x f. All bandwidths x f: / f. Groups alike on other nodes, at once: the same time."""
    rng = np.random.default_rng(seed)
    bytes_rr, ranks = rng.random((c.ranks, c.ranks)), np.arange(c.ranks)
    network = Network(c)
    base = network.busiest(network.matrix(ranks, bytes_rr).load_l).seconds
    assert network.busiest(network.matrix(ranks, factor * bytes_rr).load_l).seconds == pytest.approx(factor * base)

    def faster(table):
        return dataclasses.replace(table, **{k: v * factor for k, v in vars(table).items() if k.endswith("gb_per_s") and v})

    quick = Network(dataclasses.replace(c, nic=faster(c.nic), inside=faster(c.inside), switch=tuple(map(faster, c.switch))))
    assert quick.busiest(quick.matrix(ranks, bytes_rr).load_l).seconds == pytest.approx(base / factor)


def test_many_groups_that_are_alike():
    """16,384 ranks, 64 all-to-alls of 256 at once: the closed form of one; adapters are their own, leaves' uplinks shared."""
    c = cluster(nodes=2048, per_node=8, nics=8, switch=(SwitchTable(64, oversubscription=2.0),))
    network, b = Network(c), 1e4
    groups = [range(64 * i, 64 * i + 16384, 64) for i in range(0, 1)] + [range(256 * g, 256 * (g + 1)) for g in range(1, 64)]
    made = together([uniform(network, ranks, b) for ranks in groups[1:]])
    assert network.seconds(made) == pytest.approx(510 * 0.5e-6 + 2e-6 + 248 * b / NIC)
    spread = uniform(network, groups[0], b)  # one rank on each eighth node, 8 on a leaf switch
    assert network.busiest(spread.load_l).seconds == pytest.approx(255 * b / NIC)
    assert spread.load_l[network.kinds[-1].first] == pytest.approx(8 * 248 * b)


# ---------------------------------------------------------------- overlapping exchanges
def test_two_exchanges_share_a_link_fairly():
    """a bytes and b >= a bytes over one link of rate C from the same moment: 2 a / C and (a + b) / C; then b starts later."""
    network = Network(cluster())
    first, second = ((network.matrix([0, 4], [[0, n], [0, 0]])).load_l for n in (1e6, 3e6))
    np.testing.assert_allclose(ends([Start(0, first), Start(0, second)], network.bandwidth_l), [2e6 / NIC, 4e6 / NIC])
    late = 0.5e6 / NIC
    np.testing.assert_allclose(ends([Start(0, first), Start(late, second)], network.bandwidth_l), [1.5e6 / NIC, 4e6 / NIC])
    after = 1.5e6 / NIC
    np.testing.assert_allclose(ends([Start(0, first), Start(after, second)], network.bandwidth_l), [1e6 / NIC, after + 3e6 / NIC])


def test_two_exchanges_on_other_links_do_not_meet():
    network = Network(cluster())
    inside, outside = uniform(network, range(4), 1e6).load_l, uniform(network, [0, 4, 8], 1e6).load_l
    np.testing.assert_allclose(ends([Start(0, inside), Start(0, outside)], network.bandwidth_l), [3e6 / PORT, 2e6 / NIC])


def test_two_all_to_alls_of_two_micro_batches():
    """The same exchange twice, the second at half the time of the first: 1.5 and 2 times as long as one."""
    network = Network(cluster())
    made = uniform(network, range(16), 1e5)
    alone = network.busiest(made.load_l).seconds
    np.testing.assert_allclose(ends([Start(0, made.load_l), Start(alone / 2, made.load_l)], network.bandwidth_l), [1.5 * alone, 2 * alone])


def test_rates_of_the_parking_lot():
    """One flow over links 0, 1, 2 of 1, 2, 4; one more on each: 1/2 for the long one, and what it leaves."""
    weight_fl = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(fair_rates(weight_fl, [1, 2, 4]), [0.5, 0.5, 1.5, 3.5, np.inf])


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_rates_are_max_min_fair(flows, links, seed, weighted):
    """No link above its bandwidth; every flow has a full link on which no flow has a higher rate: that is max-min fairness."""
    rng = np.random.default_rng(seed)
    on_fl = rng.random((flows, links)) < 0.5
    assume(on_fl.any(axis=1).all())
    weight_fl = on_fl * (rng.uniform(0.1, 1, (flows, links)) if weighted else 1.0)
    bandwidth_l = rng.choice([1.0, 2.0, rng.uniform(0.5, 5)], links)
    rate_f = fair_rates(weight_fl, bandwidth_l)
    used_l = rate_f @ weight_fl
    assert (rate_f > 0).all() and (used_l <= bandwidth_l * (1 + 1e-9)).all()
    for f in range(flows):
        full = [lk for lk in range(links) if on_fl[f, lk] and used_l[lk] >= bandwidth_l[lk] * (1 - 1e-9)]
        assert any(rate_f[f] >= rate_f[on_fl[:, lk]].max() * (1 - 1e-9) for lk in full), (f, rate_f)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.floats(0.2, 5))
def test_ends_obey_their_laws(count, seed, factor):
    """Bytes are carried in full by links that are never above their rate; twice the bytes and starts: twice the times; an
    exchange is never faster than alone; all ends lie before all of them one after the other."""
    rng = np.random.default_rng(seed)
    bandwidth_l = rng.uniform(1, 5, 4)
    starts = [Start(float(rng.uniform(0, 2)), rng.uniform(0, 3, 4) * (rng.random(4) < 0.7)) for _ in range(count)]
    end_f = ends(starts, bandwidth_l)
    alone_f = np.array([s.at_s + (s.load_l / bandwidth_l).max() for s in starts])
    assert (end_f >= alone_f * (1 - 1e-9)).all()
    last = max(s.at_s for s in starts) + sum((s.load_l / bandwidth_l).max() for s in starts)
    assert end_f.max() <= last * (1 + 1e-9)
    for link in range(4):  # what a link carries between the first start and the last end fits
        carried = sum(s.load_l[link] for s in starts)
        assert carried <= bandwidth_l[link] * (end_f.max() - min(s.at_s for s in starts)) * (1 + 1e-9)
    longer = ends([Start(factor * s.at_s, factor * s.load_l) for s in starts], bandwidth_l)
    np.testing.assert_allclose(longer, factor * end_f, rtol=1e-9)


def test_links_that_are_alike_can_be_left_out():
    """1,024 ranks, exchanges within nodes, over all, and of every second rank: a few links say when each ends."""
    network = Network(cluster(nodes=256, switch=(SwitchTable(64, oversubscription=2.0),)))
    loads = [together([uniform(network, range(4 * n, 4 * n + 4), 9e6) for n in range(256)]).load_l,
             uniform(network, range(1024), 1e3).load_l, uniform(network, range(0, 1024, 2), 2e3).load_l]
    kept = distinct_links(loads, network.bandwidth_l)
    assert len(kept) < 20 < 2000 < len(network.bandwidth_l)
    starts = [Start(1e-5 * i, load_l) for i, load_l in enumerate(loads)]
    few = ends([Start(s.at_s, s.load_l[kept]) for s in starts], network.bandwidth_l[kept])
    np.testing.assert_array_equal(few, ends(starts, network.bandwidth_l))


@pytest.mark.parametrize("inside, outside, other", [(3e6, 1e6, 2e6), (1e4, 1e6, 1e6)])
def test_messages_that_are_alike_as_one_flow(inside, outside, other):
    """An all-to-all of 8 ranks on 2 nodes and another exchange, message by message (max-min over all 56 + 8 flows), and as
    three classes of flows: the same ends."""
    network = Network(cluster(nodes=2))
    nbytes = {True: inside, False: outside}
    single, kinds = [], []
    sums = {True: np.zeros(len(network.bandwidth_l)), False: np.zeros(len(network.bandwidth_l))}
    for r in range(8):
        for s in range(8):
            if r != s:
                same, pair = r // 4 == s // 4, np.zeros((8, 8))
                pair[r, s] = nbytes[same]
                load_l = network.matrix(range(8), pair).load_l
                single.append(Start(0.0, load_l))
                kinds.append(same)
                sums[same] += load_l
    ring = np.zeros((8, 8))
    for r in range(8):
        ring[r, (r + 4) % 8] = other
    single += [Start(1e-5, network.matrix(range(8), ring * (np.arange(8)[:, None] == r)).load_l) for r in range(8)]
    kinds += ["ring"] * 8
    classes = [Start(0.0, sums[True], 3), Start(0.0, sums[False], 4), Start(1e-5, network.matrix(range(8), ring).load_l)]
    one_by_one, by_class = ends(single, network.bandwidth_l), ends(classes, network.bandwidth_l)
    for kind, end in zip((True, False, "ring"), by_class):
        np.testing.assert_allclose(one_by_one[[i for i, k in enumerate(kinds) if k == kind]], end, rtol=1e-9)


def test_the_wire_step_by_step():
    """A caller with events of its own: starts, asks who ends next, moves time on."""
    wire = Wire(np.array([10.0]))
    assert wire.next_end() is None
    wire.start(0.0, "a", np.array([10.0]))
    assert wire.next_end() == (1.0, "a")
    wire.start(0.5, "b", np.array([10.0]))
    assert wire.next_end() == (pytest.approx(1.5), "a")
    wire.advance(1.0)
    wire.end("a")
    assert wire.next_end() == (pytest.approx(2.0), "b")
    wire.start(1.6, "empty", np.array([0.0]))
    assert wire.next_end() == (pytest.approx(1.6), "empty")
    wire.end("empty")
    wire.end("b")
    assert wire.next_end() is None and wire.now == pytest.approx(2.0)


def test_ranks_of_one_node_that_share_memory():
    c = dataclasses.replace(cluster(nodes=1), nic=None, inside=InsideTable(1.0, None, 5.0))
    network = Network(c)
    assert [k.name for k in network.kinds] == ["shared memory"]
    made = uniform(network, range(4), 1e6)
    assert network.busiest(made.load_l).seconds == pytest.approx(12e6 / 5e9)
    assert made.latency_s == 1e-6
