"""The node-aware exchange: its plans against plain loops, whole runs against one rank, and what crosses against the routing."""

import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from local import choices, run_job, write_prompts
from mpi import run_ranks

LAYERS, EXPERTS, VOCAB = 2, 16, 61
PROMPTS = 9


# ---------------------------------------------------------------- plans
@st.composite
def stages(draw):
    """(node of each place, this place, leaders, owner of each expert, experts [t, k], weights [t, k])."""
    places = draw(st.integers(1, 9))
    node_r = draw(st.lists(st.sampled_from("abcd"), min_size=places, max_size=places))
    me = draw(st.integers(0, places - 1))
    leaders = sorted(draw(st.sets(st.integers(0, places - 1), min_size=1)))
    experts = draw(st.integers(1, 12))
    owner_e = np.array(sorted(draw(st.lists(st.integers(0, places - 1), min_size=experts, max_size=experts))))
    k = draw(st.integers(1, min(experts, 5)))
    seed, tokens = draw(st.integers(0, 999)), draw(st.integers(0, 7))
    rng = np.random.default_rng(seed)
    expert_tk = np.array([rng.permutation(experts)[:k] for _ in range(tokens)], dtype=np.int64).reshape(tokens, k)
    return node_r, me, leaders, owner_e, expert_tk, rng.random((tokens, k), dtype=np.float32)


@given(stages())
@settings(max_examples=300, deadline=None)
def test_every_row_crosses_once_to_each_node_that_holds_one_of_its_experts(stage):
    from hpcmoe.parallel.nodes import NOWHERE, Nodes, parcels
    node_r, me, _, owner_e, expert_tk, weight_tk = stage
    nodes = Nodes(node_r, me)
    names = list(dict.fromkeys(node_r))
    made = parcels(expert_tk, weight_tk, nodes.number_r[owner_e], nodes)
    expected, per_node = [], []
    for node in names:
        before = len(expected)
        for t in range(len(expert_tk)):
            there = [(int(e), w) for e, w in zip(expert_tk[t], weight_tk[t]) if node_r[owner_e[e]] == node]
            if there and node != node_r[me]:
                expected.append((t, there))
        per_node.append(len(expected) - before)
    assert made.n_send_n.tolist() == per_node
    assert made.token_u.tolist() == [t for t, _ in expected]
    for u, (_, there) in enumerate(expected):
        padding = expert_tk.shape[1] - len(there)
        assert made.expert_uk[u].tolist() == [e for e, _ in there] + [NOWHERE] * padding
        assert made.weight_uk[u].tolist() == [w for _, w in there] + [0.0] * padding
    blocks = made.blocks()
    assert [u for _, block in blocks for u in range(block.start, block.stop)] == list(range(len(expected)))
    assert [(node, block.stop - block.start) for node, block in blocks] == [(n, c) for n, c in enumerate(per_node) if c]


@given(stages())
@settings(max_examples=200, deadline=None)
def test_forwarders_stand_as_their_senders_do(stage):
    from hpcmoe.parallel.nodes import Nodes
    node_r, _, leaders, *_ = stage
    every = [Nodes(node_r, me) for me in range(len(node_r))]
    for me, nodes in enumerate(every):
        assert nodes.mates == [r for r, node in enumerate(node_r) if node == node_r[me]]
        assert nodes.senders(leaders) == [r for r in leaders if node_r[r] != node_r[me]
                                          and every[r].forwarder(r, nodes.here) == me]
        for node in nodes.others:
            there = nodes.members[node]
            assert nodes.forwarder(me, node) == there[node_r[:me].count(node_r[me]) % len(there)]


@given(stages())
@settings(max_examples=200, deadline=None)
def test_rows_are_handed_on_by_place_and_expert_in_their_order(stage):
    from hpcmoe.parallel.nodes import NOWHERE, hand_on
    node_r, me, _, owner_e, expert_tk, _ = stage
    here = np.array([node_r[owner_e[e]] == node_r[me] for e in range(len(owner_e))])
    expert_jk = np.where(here[expert_tk], expert_tk, NOWHERE)
    pairs = [(j, c) for j in range(len(expert_jk)) for c in range(expert_jk.shape[1]) if expert_jk[j, c] != NOWHERE]
    pairs.sort(key=lambda pair: expert_jk[pair])  # stable; owners ascend with experts
    made = hand_on(expert_jk, np.arange(len(owner_e)))
    assert made.pair_s.tolist() == [j * expert_jk.shape[1] + c for j, c in pairs]
    for s, pair in enumerate(pairs):
        assert made.slot_jk[pair] == s
    assert (made.slot_jk == NOWHERE).sum() == expert_jk.size - len(pairs)


@given(stages())
@settings(max_examples=200, deadline=None)
def test_a_token_gets_its_own_nodes_rows_and_a_sum_from_each_other_node(stage):
    """Rows and slots of a leader that also forwards parcels, against plain loops over choices."""
    from hpcmoe.compute.relay import NOWHERE, Chosen
    from hpcmoe.parallel.nodes import Nodes, parcels, way
    node_r, me, _, owner_e, expert_tk, weight_tk = stage
    t, k = expert_tk.shape
    nodes, keys = Nodes(node_r, me), np.arange(len(owner_e))
    here_e = nodes.number_r[owner_e] == nodes.here
    rows = np.random.default_rng(t).permutation(2 * t)  # of tokens in x
    own = Chosen(expert_tk, weight_tk, np.zeros((2 * t, 1)), rows[:t])
    mine = parcels(expert_tk, weight_tk, nodes.number_r[owner_e], nodes)
    came = [sorted(here, key=lambda e: -e)[:k] for here in np.split(keys[here_e], 2) if len(here)] if here_e.sum() % 2 == 0 else []
    choice_jk = np.array([here + [NOWHERE] * (k - len(here)) for here in came], np.int32).reshape(-1, k)
    made = way(own, mine, choice_jk, np.ones(choice_jk.shape, np.float32), here_e, keys)
    pairs = [(e, i, row) for i, (row, choice) in enumerate([*zip(rows, expert_tk), *zip(range(2 * t, 3 * t + 9), choice_jk)])
             for e in choice if e != NOWHERE and here_e[e]]
    pairs.sort(key=lambda pair: pair[0])
    assert made.row_s.tolist() == [row for *_, row in pairs]
    assert made.row_u.tolist() == [rows[token] for token in mine.token_u]
    slot = {(i, e): s for s, (e, i, _) in enumerate(pairs)}
    for j, here in enumerate(came):
        assert made.slot_jk[j].tolist() == [slot[t + j, e] for e in here] + [NOWHERE] * (k - len(here))
    for i in range(t):
        terms = [(slot[i, e], w) for e, w in zip(expert_tk[i], weight_tk[i]) if here_e[e]]
        terms += [(len(pairs) + u, 1.0) for u, token in enumerate(mine.token_u) if token == i]
        terms += [(NOWHERE, 0.0)] * (k - len(terms))
        assert list(zip(made.slot_tk[i].tolist(), made.weight_tk[i].tolist())) == terms
    alone = way(None, None, choice_jk, np.ones(choice_jk.shape, np.float32), here_e, keys)  # on a rank that does not lead
    assert alone.row_s.tolist() == [row for _, i, row in sorted((e, i, j) for j, here in enumerate(came) for e in here for i in [j])]
    assert len(alone.row_u) == len(alone.slot_tk) == 0 and alone.slot_jk.shape == choice_jk.shape


def test_hops_follow_each_other_when_the_one_before_is_done():
    from hpcmoe.device import Event
    from hpcmoe.parallel.handle import Chain, Handle

    class Gate(Event):
        done = False

    seen, first, second = [], Gate(), Gate()

    def hops():
        seen.append("first")
        yield Handle(after=first)
        seen.append("second")
        yield Handle(finish=lambda: seen.append("finished"), after=second)
        seen.append("last")

    chain = Chain(hops())
    assert not chain.test() and seen == ["first"]
    first.done = True
    assert not chain.start() and seen == ["first", "second"]
    second.done = True
    assert chain.test() and chain.test() and seen == ["first", "second", "finished", "last"]


def test_handles_that_wait_for_each_other_are_driven_together():
    """Each is posted in its own time, and is not done before the other is posted."""
    from hpcmoe.device import Event
    from hpcmoe.parallel.handle import Chain, Handle, Together

    class Gate(Event):
        done = False

    posted, gates = [], [Gate(), Gate()]

    class Half(Handle):
        def test(self):
            return self.start() and len(posted) == 2

    halves = [Half(lambda n=n: posted.append(n) or [], after=gate) for n, gate in enumerate(gates)]
    first = Handle(after=Gate())
    chain = Chain(iter([Together(first, beside=(halves[0],)), Together(*halves)]))
    assert not chain.test() and posted == [] and not chain.posted
    gates[0].done = True
    assert not chain.test() and posted == [0]  # beside, while the first hop is still waiting
    first.after.done = gates[1].done = True
    assert not chain.test() and posted == [0, 1]
    assert chain.posted and chain.test()


# ---------------------------------------------------------------- whole runs
@pytest.fixture(scope="module", params=[2, 4], ids=["k=2", "k=4"])
def case(request, tmp_path_factory):
    """A random model of so many choices, requests, and what one rank makes of them."""
    from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
    from hpcmoe.data.create import create
    folder = tmp_path_factory.mktemp("hierarchical")
    model = ModelConfig("mixtral", VOCAB, 32, LAYERS, AttentionConfig(4, 2, 8), RouterConfig(EXPERTS, request.param), ExpertConfig(24), 64)
    create(str(folder / "model.h5"), model, dtype="fp32", seed=5)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, VOCAB, n) for n in (1, 2, 3, 5, 8, 13, 21, 7, 1)]
    write_prompts(folder / "requests.jsonl", prompts, max_tokens=[2 + i % 4 for i in range(PROMPTS)],
                  temperature=[0.0 if i % 2 else 0.9 for i in range(PROMPTS)], seed=list(range(PROMPTS)), logprobs=1, ignore_eos=True)
    sets = {"weights.file": folder / "model.h5", "requests.file": folder / "requests.jsonl"}
    _, rows, _ = run_job(1, folder, sets, name="base")
    return folder, sets, prompts, choices(rows), request.param


def run(case, ranks, per_node, name="job", **more):
    folder, sets, *_ = case
    sets = {**sets, "run.transport": "hierarchical", **{key.replace("_", ".", 1): value for key, value in more.items()}}
    return run_job(ranks, folder, sets, env={"HPCMOE_RANKS_PER_NODE": str(per_node)}, name=name)


MATRIX = {
    2: [(4, 2, {}), (8, 3, {"layout_leaders": "node"}), (16, 4, {"layout_leaders": 2}), (8, 2, {"layout_pp": 2, "run_lanes": 2}),
        (4, 4, {"run_schedule": "plain"})],
    4: [(8, 3, {"run_lanes": 2, "run_micro_batches": 3, "run_batch_tokens": 9}), (8, 4, {"layout_tp": 2}), (16, 3, {"layout_pp": 2, "layout_leaders": 2}),
        (8, 2, {"layout_dp": 2, "layout_leaders": "node"}), (3, 1, {"layout_leaders": 1})],
}


@pytest.mark.mpi
@pytest.mark.parametrize("number", range(5))
def test_the_same_tokens_and_log_probabilities_as_on_one_rank(case, number):
    *_, prompts, base, top_k = case
    ranks, per_node, more = MATRIX[top_k][number]
    _, rows, report = run(case, ranks, per_node, **more)
    for mine, expected in zip(choices(rows), base):
        assert mine["token_ids"] == expected["token_ids"]
        np.testing.assert_allclose(mine["logprobs"]["token_logprobs"], expected["logprobs"]["token_logprobs"], atol=1e-5)
    assert report["run"]["transport"] == "hierarchical"
    tokens = sum(len(p) + len(c["token_ids"]) - 1 for p, c in zip(prompts, base))
    assert [layer["rows"] for layer in report["expert_load"]["layers"]] == [tokens * top_k] * LAYERS
    dispatch = report["traffic"]["dispatch"]
    pairs = tokens * top_k * LAYERS * more.get("layout_tp", 1)  # each tensor shard sends them to its fellows
    assert dispatch["rows_own"] + dispatch["rows_within_nodes"] == pairs  # every pair reaches its expert


@pytest.mark.mpi
@pytest.mark.parametrize("leaders, per_node", [("all", 3), (2, 2)])
def test_what_crosses_between_nodes_is_what_the_routers_ask_for(case, leaders, per_node):
    """Closed forms over every token's experts, as the plain reference chooses them."""
    from hpcmoe.data.weights import WeightsFile
    from hpcmoe.model import reference
    folder, sets, prompts, base, top_k = case
    ranks, width = 8, 4 * 32
    _, rows, hierarchical = run(case, ranks, per_node, "count", layout_leaders=leaders)
    _, _, flat = run(case, ranks, per_node, "count-flat", layout_leaders=leaders, run_transport="pairwise")
    leader_of = leader_of_requests(rows, prompts, ranks if leaders == "all" else leaders)
    node_of_expert = [e * ranks // EXPERTS // per_node for e in range(EXPERTS)]
    pairs = crossings = 0
    with WeightsFile(sets["weights.file"]) as file:
        for i, (prompt, choice) in enumerate(zip(prompts, base)):
            def seen(layer, expert_tk, here=leader_of[i] // per_node):
                nonlocal pairs, crossings
                for expert_k in expert_tk:
                    away = [node_of_expert[e] for e in expert_k if node_of_expert[e] != here]
                    pairs += len(away)
                    crossings += len(set(away))
            reference.logits(file, list(prompt) + choice["token_ids"][:-1], 64, seen)
    assert 0 < crossings < pairs
    for kind, row_bytes in (("dispatch", width + 8 * top_k), ("combine", width)):
        assert flat["traffic"][kind]["rows_between_nodes"] == pairs
        assert hierarchical["traffic"][kind]["rows_between_nodes"] == crossings
        assert flat["traffic"][kind]["bytes_between_nodes"] == pairs * width
        assert hierarchical["traffic"][kind]["bytes_between_nodes"] == crossings * row_bytes


def leader_of_requests(rows, prompts, leaders) -> list[int]:
    """The place that leads each request: longest first, each to the leader with the fewest tokens so far."""
    length = [len(p) + 2 + i % 4 for i, p in enumerate(prompts)]
    load, where = [0] * leaders, [0] * len(prompts)
    for i in sorted(range(len(prompts)), key=lambda i: (-length[i], i)):
        where[i] = load.index(min(load))
        load[where[i]] += length[i]
    assert len(rows) == len(prompts)
    return where


@pytest.mark.mpi
@pytest.mark.parametrize("case", [4], indirect=True, ids=["k=4"])
def test_two_runs_give_the_same_bits(case):
    texts = [json.dumps(choices(run(case, 8, 3, f"bits{n}", run_lanes=2)[1])) for n in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.mpi
@pytest.mark.parametrize("case", [2], indirect=True, ids=["k=2"])
def test_rows_rounded_to_fp8_cross_as_they_are(case):
    """The same as the flat exchange of fp8 rows gives, but for the order of sums."""
    folder, *_, top_k = case
    _, rows, _ = run(case, 4, 2, "fp8", run_dispatch_dtype="fp8", task="score")
    _, flat, _ = run(case, 4, 2, "fp8-flat", run_dispatch_dtype="fp8", task="score", run_transport="pairwise")
    for mine, other in zip(rows, flat):
        if mine["response"]:
            a, b = ([v for v in row["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"] if v is not None] for row in (mine, other))
            np.testing.assert_allclose(a, b, atol=0.02)


# ---------------------------------------------------------------- the choice
@pytest.mark.parametrize("task, most, sets, rows", [
    ("generate", 40, {}, 20), ("generate", 1, {}, 1), ("generate", 1000, {}, 64), ("score", 4, {}, 64),
    ("throughput", 40, {"max_sequences": 96}, 3), ("generate", 40, {"batch_tokens": 5}, 1)])
def test_a_trial_has_the_rows_of_a_usual_step(task, most, sets, rows):
    """16 leaders, 1,024 rows in a step of two micro-batches."""
    from hpcmoe.config import RunJob
    from hpcmoe.parallel.plan import Cut, usual_rows
    assert usual_rows(RunJob(**sets), task, 16, most, Cut(2, 1)) == rows


PROGRAM = """
    import sys
    from mpi4py import MPI
    from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig, RunJob
    from hpcmoe.device import Device
    from hpcmoe.errors import UserError
    from hpcmoe.parallel import trial
    from hpcmoe.parallel.hierarchical import HierarchicalExchange
    from hpcmoe.parallel.layout import Layout
    from hpcmoe.parallel.world import World, node_names
    comm = MPI.COMM_WORLD
    world = World(comm, Layout(1, 1, comm.size), 1, node_names(comm))
    model = ModelConfig("mixtral", 61, 32, 2, AttentionConfig(4, 2, 8), RouterConfig(8, 2), ExpertConfig(24), 64)
    said = []
    def choose(name, device=Device()):
        try:
            trial.choose(world, RunJob(transport=name), model, device, 0, 16, True, said.append)
            return world.transport
        except UserError as error:
            return str(error)
"""


@pytest.mark.mpi
@pytest.mark.parametrize("per_node, measured", [(2, True), (4, False), (1, False)])
def test_auto_measures_where_nodes_have_several_ranks(per_node, measured):
    done = run_ranks(4, PROGRAM + f"""
    times = iter([{{"ialltoallv": 1.0, "hierarchical": 0.95}}, {{"ialltoallv": 1.0, "hierarchical": 0.5}}])
    first = choose("auto")
    assert first in ("ialltoallv", "hierarchical") and set(comm.allgather(first)) == {{first}}
    assert len(said) == {int(measured)} and all(first + " is taken" in text and text.count(" ms") == 2 for text in said), said
    trial.Trial.medians = lambda self: next(times)
    assert choose("auto") == "ialltoallv"  # by a hair is not enough
    assert choose("auto") == ("hierarchical" if {measured} else "ialltoallv")
    assert choose("pairwise") == "pairwise" and choose("hierarchical") == "hierarchical"
    print("chosen")
    """, env={"HPCMOE_RANKS_PER_NODE": str(per_node)}).check()
    assert done.out.split() == ["chosen"] * 4


@pytest.mark.mpi
def test_wrong_sums_are_refused_by_name_and_avoided_by_choice():
    done = run_ranks(4, PROGRAM + """
    merge = HierarchicalExchange.merge
    def broken(self, op):
        merge(self, op)
        if self.me == 2:
            self.compute.x_td[-1] += 1
    HierarchicalExchange.merge = broken
    trial.Trial.medians = lambda self: {"ialltoallv": 1.0, "hierarchical": 0.5}
    assert choose("auto") == "ialltoallv"
    assert choose("hierarchical") == "job: run.transport = 'hierarchical': failed its self-test: wrong sums came back"
    print("refused")
    """, env={"HPCMOE_RANKS_PER_NODE": "2"}).check()
    assert done.out.split() == ["refused"] * 4


@pytest.mark.mpi
@pytest.mark.parametrize("per_node", [1, 2, 3, 5])
def test_made_up_rows_come_back_right_for_all_leaders_and_counts(per_node):
    """No rows, one row, many; experts that share a rank; ranks without an expert; every kind of leaders."""
    done = run_ranks(5, """
        from mpi4py import MPI
        from hpcmoe.config import RouterConfig
        from hpcmoe.parallel.layout import Layout
        from hpcmoe.parallel.trial import Trial, made_up
        from hpcmoe.parallel.world import World, node_names
        comm, names = MPI.COMM_WORLD, ("pairwise", "hierarchical")
        for leaders in ("all", "node", "2"):
            world = World(comm, Layout(1, 1, 5, leaders=leaders), 1, node_names(comm))
            for experts, k, rows in ((16, 4, 9), (5, 5, 3), (7, 1, 1), (3, 2, 0)):
                router = RouterConfig(experts, k)
                trial = Trial(world, router, made_up(world, router, 6, 24, rows), names, True)
                assert all(trial.right(name) for name in names), (leaders, experts)
                flat, other = (trial.records[name] for name in names)
                if len(set(world.node_r)) == comm.size:  # a rank is a node: what crosses is the same
                    pairs = [comm.allreduce(r.rows_inter["COMBINE"]) for r in (flat, other)]
                    assert pairs[0] >= pairs[1] and (experts > 5 or pairs[0] == pairs[1])
                    assert other.rows_intra["DISPATCH"] == 0
        print("right")
    """, env={"HPCMOE_RANKS_PER_NODE": str(per_node)}).check()
    assert done.out.split() == ["right"] * 5


@pytest.mark.mpi
@pytest.mark.parametrize("setting, windows", [("MOST_BYTES = 1 << 16", 1), ("SHARED = '/nowhere'", 0), ("LEAST_BYTES = 1 << 60", 0)])
def test_rows_for_which_the_window_has_no_room_go_as_messages(setting, windows):
    """300 rows of 256 bytes for one rank are more than 64 KiB, those for the others are not; or there is no window at all."""
    done = run_ranks(4, f"""
        import numpy as np
        from mpi4py import MPI
        from hpcmoe.device import Device
        from hpcmoe.parallel import exchange, window
        from hpcmoe.parallel.exchange import Channel
        from hpcmoe.parallel.handle import Waiter
        window.{setting}
        comm = MPI.COMM_WORLD
        opened = window.open_window(comm, 2, 1 << 30, 4)
        assert (opened is not None) == {windows} and (opened is None or opened.size == 1 << 16)
        device = Device()
        channel, row = Channel(comm, device, device.lane()), exchange.row_type(256)
        if opened:
            mates = window.Mates(channel, [0, 1, 2, 3], comm.rank, opened, 1, 1)
        else:
            mates = window.Messages(channel, [0, 1, 2, 3], comm.rank, exchange.pairwise, row)
        n_qq = np.array([[3, 0, 100, 5], [0, 0, 100, 0], [7, 1, 40, 0], [1, 2, 60, 3]])
        mine = np.concatenate([50 * comm.rank + 10 * q + np.arange(n) % 10 for q, n in enumerate(n_qq[comm.rank])])
        mine = np.tile(mine.astype(np.uint8)[:, None], 256)
        def source(part, out=None):
            if out is None:
                return mine[part]
            out[:] = mine[part]
        for turn in range(2):
            memory = mates.memory(n_qq, 256)
            assert (memory is not None) == ({windows} and comm.rank != 2)
            recv = np.zeros((n_qq[:, comm.rank].sum(), 256), np.uint8) if memory is None else memory
            Waiter(True, 60.0)(mates.move(n_qq, source, recv), "move")
            expected = [50 * a + 10 * comm.rank + i % 10 for a in range(4) for i in range(n_qq[a, comm.rank])]
            assert np.array_equal(recv, np.tile(np.array(expected, np.uint8)[:, None], 256))
            comm.Barrier()
        if opened:
            mates.parts = []
            opened.close()
        print("moved")
    """).check()
    assert done.out.split() == ["moved"] * 4


@pytest.mark.mpi
@pytest.mark.parametrize("program, env, ranks", [
    ("exchange.py --rows 3 --top-k 2,4 --d 16 --f 8 --repeats 2", {"HPCMOE_RANKS_PER_NODE": "3"}, 8),
    ("window.py --rows 2,40 --d 16 --repeats 2", {}, 3)])
def test_the_benchmarks_run_and_what_they_count_is_right(program, env, ranks):
    done = run_ranks(ranks, ["-m", "mpi4py", *f"tests/benchmarks/{program}".split()], env=env).check()
    assert len(done.out.strip().splitlines()) == 4
