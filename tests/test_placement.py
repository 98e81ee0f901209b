"""Routing statistics, placement files, experts by slot; runs with a placement give the tokens of runs without."""

import json
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from cudabed import bed
from local import choices, run_job, write_prompts
from mpi import run_ranks

LAYERS, EXPERTS, TOP_K = 3, 16, 2
NODES = {"HPCMOE_RANKS_PER_NODE": "4"}
MACHINE = """
name = "test"
[nodes]
count = {nodes}
ranks_per_node = {per_node}
[nic]
bandwidth_gb_per_s = 1.0
latency_us = 1.0
[rank]
memory_gib = 1.0
tflop_per_s = 1.0
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A random model with taste, requests, and a run on one rank with routing statistics: its folder, settings and rows."""
    from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
    from hpcmoe.data.create import create
    folder = tmp_path_factory.mktemp("placement")
    model = ModelConfig("mixtral", 97, 32, LAYERS, AttentionConfig(4, 2, 8), RouterConfig(EXPERTS, TOP_K), ExpertConfig(24), 128)
    create(str(folder / "model.h5"), model, dtype="fp32", seed=11)
    rng = np.random.default_rng(3)
    write_prompts(folder / "requests.jsonl", [rng.integers(3, 97, n) for n in (1, 9, 5, 14, 8, 13, 21, 3, 7, 7)],
                  max_tokens=[3 + i % 4 for i in range(10)], logprobs=1, ignore_eos=True)
    sets = {"weights.file": folder / "model.h5", "requests.file": folder / "requests.jsonl"}
    _, rows, report = run_job(1, folder, {**sets, "run.routing_statistics": "true"}, name="base")
    assert "placement" not in report
    return SimpleNamespace(folder=folder, sets=sets, model=model, rows=rows, routing=folder / "base-1" / "routing.h5")


def chosen_by_reference(case) -> list[list[np.ndarray]]:
    """expert_tk of every request, by layer, from the plain loop."""
    from hpcmoe.data.weights import WeightsFile
    from hpcmoe.model import reference
    seen = [[] for _ in range(LAYERS)]
    with WeightsFile(case.sets["weights.file"]) as file, open(case.sets["requests.file"]) as requests:
        for line, choice in zip(requests, choices(case.rows)):
            tokens = json.loads(line)["body"]["prompt"] + choice["token_ids"][:-1]
            reference.logits(file, tokens, 128, lambda layer, expert_tk: seen[layer].append(expert_tk))
    return seen


def place(case, *more, name="placement.json", nodes=4, per_node=4):
    """Runs `hpcmoe place` for a cluster of so many nodes; the placement file and what was printed."""
    from hpcmoe.data.placement import read_placement
    (case.folder / "machine.toml").write_text(MACHINE.format(nodes=nodes, per_node=per_node))
    path = case.folder / name
    done = run_ranks(1, ["-m", "hpcmoe", "place", "--weights", case.sets["weights.file"], "--routing", case.routing, "--machine",
                         case.folder / "machine.toml", "--output", path, *more]).check()
    return path, read_placement(path, case.model), done.out


def same_tokens(rows, expected) -> None:
    for mine, want in zip(choices(rows), choices(expected), strict=True):
        assert mine["token_ids"] == want["token_ids"]
        np.testing.assert_allclose(mine["logprobs"]["token_logprobs"], want["logprobs"]["token_logprobs"], atol=1e-5)


# ---------------------------------------------------------------- statistics
@pytest.mark.mpi
@pytest.mark.parametrize("ranks, more", [(1, {}), (6, {"layout.pp": 3, "layout.leaders": 1}), (4, {"layout.dp": 2})])
def test_pairs_are_those_of_the_plain_reference(case, ranks, more):
    _, rows, _ = run_job(ranks, case.folder, {**case.sets, **more, "run.routing_statistics": "true"}, name="pairs")
    same_tokens(rows, case.rows)
    expected = np.zeros((LAYERS, EXPERTS, EXPERTS), dtype=int)
    for layer, requests in enumerate(chosen_by_reference(case)):
        for expert_tk in requests:
            for first, second in expert_tk:
                for e, f in ((first, first), (second, second), (first, second), (second, first)):
                    expected[layer, e, f] += 1
    with h5py.File(case.folder / f"pairs-{ranks}" / "routing.h5") as file:
        assert file["pairs"][:].tolist() == expected.tolist()


def test_together_counts_pairs_of_any_number_of_choices():
    from hpcmoe.model.route import together
    rng = np.random.default_rng(0)
    expert_tk = np.array([rng.permutation(7)[:3] for _ in range(40)])
    expected = np.zeros((7, 7), dtype=int)
    for row in expert_tk:
        for e in row:
            for f in row:
                expected[e, f] += 1
    assert together(expert_tk, 7).tolist() == expected.tolist()
    assert together(np.zeros((0, 3), dtype=int), 7).sum() == 0


# ---------------------------------------------------------------- runs with a placement
@pytest.mark.mpi
@pytest.mark.parametrize("ranks, more", [(16, {}), (4, {}), (4, {"layout.dp": 2, "layout.ep": 2}), (6, {"layout.pp": 3})])
def test_a_placement_changes_no_token_and_experts_keep_their_numbers(case, ranks, more):
    """Outputs, expert loads and routing statistics are those of the run without; the placement is not the identity."""
    layout = [f"--{key.split('.')[1]}={value}" for key, value in more.items()]
    path, placement, _ = place(case, *layout, nodes=ranks // 2, per_node=2)
    assert (placement.expert_ls != np.arange(EXPERTS)).any()
    sets = {**case.sets, **more, "layout.placement": path, "run.routing_statistics": "true"}
    _, rows, report = run_job(ranks, case.folder, sets, env={"HPCMOE_RANKS_PER_NODE": "2"}, name="placed")
    same_tokens(rows, case.rows)
    with h5py.File(case.routing) as a, h5py.File(case.folder / f"placed-{ranks}" / "routing.h5") as b:
        pairs = a["pairs"][:]
        assert b["pairs"][:].tolist() == pairs.tolist()
    rows_le = np.einsum("lee->le", pairs)
    with h5py.File(case.folder / f"placed-{ranks}" / "expert_load.h5") as file:
        assert file["rows"][:].sum(axis=(0, 1)).tolist() == rows_le.tolist()
    for layer, load in enumerate(report["expert_load"]["layers"]):
        assert load["rows_per_expert"] == rows_le[layer].tolist() and load["busiest_expert"] == rows_le[layer].argmax()
        shown = report["placement"]["layers"][layer]
        assert shown["tokens"] == rows_le[layer].sum() // TOP_K
        assert shown["rows_busiest_rank"] == pytest.approx(shown["rows_busiest_rank_predicted"])
    assert report["placement"]["expert_of_slot"] == placement.expert_ls.tolist()


def test_a_placement_with_copies_balances_a_run(case):
    """As promised: the same tokens, the busiest rank as heavy as predicted but for rows that are not divided (copies get
    them by turns on each of 6 leaders), lighter than without copies."""
    path, placement, out = place(case, "--replicas", "8", nodes=3, per_node=2, name="copies.json")
    assert "no copies" in out and "16 experts and 8 copies on 6 places" in out
    assert placement.expert_ls.shape == (LAYERS, EXPERTS + 8)
    for expert_s in placement.expert_ls:
        assert set(expert_s) == set(range(EXPERTS)) and all(len(set(held)) == 4 for held in expert_s.reshape(6, 4))
    sets = {**case.sets, "layout.replicas": 8, "layout.placement": path}
    _, rows, report = run_job(6, case.folder, sets, env={"HPCMOE_RANKS_PER_NODE": "2"}, name="copies")
    same_tokens(rows, case.rows)
    with h5py.File(case.routing) as file:
        rows_le = np.einsum("lee->le", file["pairs"][:])
    for layer, shown in enumerate(report["placement"]["layers"]):
        in_order = max(rows_le[layer, held].sum() for held in np.split(np.arange(EXPERTS), [3, 6, 9, 12, 14]))
        assert shown["rows_busiest_rank_predicted"] <= shown["rows_busiest_rank"] * 1.001 <= 1.15 * shown["rows_busiest_rank_predicted"]
        assert shown["rows_busiest_rank"] < in_order
        assert report["expert_load"]["layers"][layer]["rows_per_expert"] == rows_le[layer].tolist()


@pytest.mark.mpi
@pytest.mark.parametrize("ranks, per_node", [(16, 4), (4, 1)])
def test_rows_between_nodes_are_those_predicted(case, ranks, per_node):
    """One leader: every token comes from node 0, so the prediction is no expectation but a count, and exact; and it is
    that of a plain loop over the reference's choices. What a hierarchical exchange would send is held against it too."""
    path, placement, _ = place(case, "--leaders", "1", nodes=4, per_node=per_node)
    sets = {**case.sets, "layout.leaders": 1, "layout.placement": path, "run.transport": "ialltoallv"}
    _, rows, report = run_job(ranks, case.folder, sets, env={"HPCMOE_RANKS_PER_NODE": str(per_node)}, name="counted")
    same_tokens(rows, case.rows)
    total = 0
    for layer, requests in enumerate(chosen_by_reference(case)):
        slot_of = np.argsort(placement.expert_ls[layer])
        nodes = [[int(slot_of[e]) // 4 for e in chosen] for expert_tk in requests for chosen in expert_tk]
        flat, once = sum(n != 0 for row in nodes for n in row), sum(len(set(row) - {0}) for row in nodes)
        shown = report["placement"]["layers"][layer]
        assert shown["rows_between_nodes"] == flat == pytest.approx(shown["rows_between_nodes_predicted"])
        assert shown["rows_busiest_link"] == flat == pytest.approx(shown["rows_busiest_link_predicted"])
        assert once == pytest.approx(len(nodes) * placement.predicted[layer].hierarchical_between_nodes)
        total += flat
    assert report["traffic"]["dispatch"]["rows_between_nodes"] == total


@pytest.mark.mpi
def test_leaders_on_all_ranks_meet_the_prediction_roughly(case):
    """The prediction is an expectation over which leader has which request: within 10 % on some hundred tokens."""
    path, _, _ = place(case)
    _, _, report = run_job(16, case.folder, {**case.sets, "layout.placement": path}, env=NODES, name="expected")
    for shown in report["placement"]["layers"]:
        assert shown["rows_between_nodes"] == pytest.approx(shown["rows_between_nodes_predicted"], rel=0.1)


@pytest.mark.mpi
def test_other_nodes_than_the_placement_was_made_for_have_no_prediction(case):
    path, _, _ = place(case)
    _, rows, report = run_job(16, case.folder, {**case.sets, "layout.placement": path}, env={"HPCMOE_RANKS_PER_NODE": "8"}, name="others")
    same_tokens(rows, case.rows)
    assert all(shown["rows_between_nodes_predicted"] is None for shown in report["placement"]["layers"])


@pytest.mark.mpi
def test_a_discovered_machine_is_the_one_that_is_there(case):
    path = case.folder / "found.json"
    done = run_ranks(6, ["-m", "hpcmoe", "place", "--weights", case.sets["weights.file"], "--routing", case.routing, "--machine",
                         "discovered", "--ep", "6", "--output", path], env={"HPCMOE_RANKS_PER_NODE": "2"}).check()
    assert "3 nodes of 2 ranks on 1 switch" in done.out and "switch unknown" in done.out
    assert json.loads(path.read_text())["layout"]["node_of_rank"] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("address, switch", [("", ""), ("s0.s3.node17", "s0.s3"), ("node1", "")])
def test_leaf_switches_by_slurm(address, switch):
    from hpcmoe.cluster.discover import leaf_switch
    assert leaf_switch({"SLURM_TOPOLOGY_ADDR": address} if address else {}) == switch


@pytest.mark.parametrize("players", [2, 4, 6, 10])
def test_every_two_nodes_meet_once(players):
    from hpcmoe.cluster.discover import _opponent
    met = []
    for turn in range(players - 1):
        other = [_opponent(me, turn, players) for me in range(players)]
        assert all(other[other[me]] == me != other[me] for me in range(players))
        met += [(me, o) for me, o in enumerate(other) if me < o]
    assert len(set(met)) == len(met) == players * (players - 1) // 2


@pytest.mark.skipif(bool(bed.missing()), reason=bed.missing() or "-")
def test_a_placement_changes_no_token_on_gpus(tmp_path):
    """On the CuPy look-alike: the GPU's loader reads the same view of the file."""
    from hpcmoe.data.placement import Placement, Predicted, Seats, Shape, write_placement
    from test_gpu_engine import model_of, settings
    sets, model = settings(tmp_path, "mixtral"), model_of("mixtral")
    e, rng = model.router.experts, np.random.default_rng(1)
    order_le = np.array([rng.permutation(e) for _ in range(model.layers)])
    write_placement(tmp_path / "p.json", Placement(Shape.of(model), Seats(1, 2, "all", (0, 1)), order_le,
                                                   (Predicted(1.0, 1.0, 1.0, 1.0, 1.0),) * model.layers))
    env = bed.lookalike_env()
    _, rows, _ = run_job(2, tmp_path, {**sets, "layout.ep": 2}, env=env, timeout=200, name="plain")
    _, placed, _ = run_job(2, tmp_path, {**sets, "layout.ep": 2, "layout.placement": tmp_path / "p.json"}, env=env, timeout=200, name="placed")
    assert [c["token_ids"] for c in choices(placed)] == [c["token_ids"] for c in choices(rows)]


# ---------------------------------------------------------------- files that do not fit
def refused(call, *words) -> None:
    from hpcmoe.errors import UserError
    with pytest.raises(UserError) as error:
        call()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("change, words", [
    (lambda d: d.update(wings=2), ["wings", "one of the keys"]), (lambda d: d.pop("experts"), ["experts is missing"]),
    (lambda d: d["model"].update(experts=8), ["experts=8", "expected", "experts=16"]),
    (lambda d: d["model"].update(colour=8), ["model.colour", "one of the keys"]),
    (lambda d: d["experts"].pop(), ["experts = 2", "3 layers"]),
    (lambda d: d["experts"][1].__setitem__(0, d["experts"][1][1]), ["experts[1]", "each of the experts 0 to 15, at least once"]),
    (lambda d: d["experts"].__setitem__(0, "x"), ["experts[0]"]), (lambda d: d["experts"][2].append(3), ["experts[2]", "16 slots"]),
    (lambda d: d["experts"][0].append(16), ["experts[0]", "each of the experts 0 to 15, at least once"]), (lambda d: d["predicted"].pop(), ["predicted", "3 layers"]),
    (lambda d: d["predicted"][0].pop("busiest_rank"), ["predicted[0].busiest_rank is missing"]),
    (lambda d: d.update(version=2), ["version = 2"]), (lambda d: d.update(format="x"), ["not a placement"]),
    (lambda d: d["layout"].update(node_of_rank="all"), ["layout.node_of_rank", "list of integers"])])
def test_a_placement_that_does_not_fit_is_refused(case, tmp_path, change, words):
    from hpcmoe.data.placement import read_placement
    data = json.loads(example(case, tmp_path).read_text())
    change(data)
    (tmp_path / "changed.json").write_text(json.dumps(data))
    refused(lambda: read_placement(tmp_path / "changed.json", case.model), "changed.json", *words)


def example(case, folder):
    from hpcmoe.data.placement import Placement, Predicted, Seats, Shape, write_placement
    order_le = np.array([np.random.default_rng(i).permutation(EXPERTS) for i in range(LAYERS)])
    placement = Placement(Shape.of(case.model), Seats(1, 4, "all", (0, 0, 1, 1)), order_le, (Predicted(1, 2, 3, 4, 5.0),) * LAYERS)
    write_placement(folder / "placement.json", placement)
    return folder / "placement.json"


def test_a_placement_comes_back_as_it_was_written(case, tmp_path):
    from hpcmoe.data.placement import Predicted, Seats, read_placement
    found = read_placement(example(case, tmp_path), case.model)
    assert found.expert_ls[2].tolist() == np.random.default_rng(2).permutation(EXPERTS).tolist()
    assert found.seats == Seats(1, 4, "all", (0, 0, 1, 1)) and found.predicted == (Predicted(1, 2, 3, 4, 5.0),) * LAYERS


def test_other_layouts_and_texts_are_refused(case, tmp_path):
    from hpcmoe.config import JobConfig, LayoutJob
    from hpcmoe.data.placement import read_placement
    from hpcmoe.parallel.layout import Layout
    from hpcmoe.placing import placement_of
    path = example(case, tmp_path)
    job = JobConfig(layout=LayoutJob(placement=str(path)))
    assert placement_of(job, case.model, Layout(2, 1, 4)) is not None
    refused(lambda: placement_of(job, case.model, Layout(1, 1, 8)), "layout.ep = 4", "expected 8")
    refused(lambda: placement_of(job, case.model, Layout(1, 1, 4, replicas=2)), "experts[0]", "18 slots")
    refused(lambda: read_placement(tmp_path / "none.json", case.model), "none.json", "cannot be read")
    (tmp_path / "text.json").write_text("{")
    refused(lambda: read_placement(tmp_path / "text.json", case.model), "not JSON")


def test_statistics_that_do_not_fit_are_refused(case, tmp_path):
    import dataclasses

    from hpcmoe.data.routing import read_routing, write_routing
    found = read_routing(case.routing, case.model)
    assert (found.pairs_lee.sum(axis=2) == found.rows_le).all() and (found.rows_le.sum(axis=1) == TOP_K * found.tokens_l).all()
    other = dataclasses.replace(case.model, layers=2)
    refused(lambda: read_routing(case.routing, other), "[3, 16, 16]", "[2, 16, 16]")
    refused(lambda: read_routing(tmp_path / "none.h5", case.model), "no such file", "routing_statistics")
    refused(lambda: read_routing(case.sets["weights.file"], case.model), "hpcmoe-routing")
    counts = found.pairs_lee.copy()
    counts[0, 0, 1] += 1
    path = write_routing(tmp_path, case.model, counts)
    refused(lambda: read_routing(path, case.model), "damaged")
    path = write_routing(tmp_path, case.model, counts * 0)
    refused(lambda: read_routing(path, case.model), "layer 0 saw no token")
    path.write_bytes(path.read_bytes()[:300])
    refused(lambda: read_routing(path, case.model), "cannot be read")


@pytest.mark.parametrize("text, words", [
    (MACHINE.format(nodes=0, per_node=4), ["nodes.count = 0"]),
    (MACHINE.format(nodes=10**9, per_node=4), ["nodes.count = 1000000000", "at most 1048576 ranks"]),
    (MACHINE.format(nodes=2, per_node=4).replace("bandwidth_gb_per_s = 1.0", "bandwidth_gb_per_s = inf"), ["nic.bandwidth_gb_per_s = inf"]),
    (MACHINE.format(nodes=2, per_node=4).replace("latency_us = 1.0", "latency_us = nan"), ["nic.latency_us = nan"]),
    (MACHINE.format(nodes=2, per_node=4) + "wings = 1", ["rank.wings"]),
    (MACHINE.format(nodes=2, per_node=4) + "[[switch]]\nnodes = 2", ["switch[0].uplink_gb_per_s"]), ("name = 1", ["name"]), ("=", ["not TOML"]),
    (MACHINE.format(nodes=2, per_node=4).replace("memory_gib = 1.0", "memory_gib = 0.0"), ["rank.memory_gib"])])
def test_cluster_files_that_are_wrong_are_refused(tmp_path, text, words):
    from hpcmoe.cluster.machine import read_machine
    (tmp_path / "m.toml").write_text(text)
    refused(lambda: read_machine(str(tmp_path / "m.toml")), "m.toml", *words)


def test_shipped_cluster_files_are_sound():
    from hpcmoe.cluster.machine import read_machine
    from mpi import ROOT
    files = sorted(ROOT.glob("inputs/clusters/*.toml"))
    assert len(files) >= 2
    assert {len(read_machine(str(file)).node_of_rank) for file in files} >= {16, 64}


def test_a_cluster_file_that_contradicts_what_is_asked_for_is_refused(case):
    from hpcmoe.cluster import place_run
    path = case.folder / "sixteen.toml"
    path.write_text(MACHINE.format(nodes=4, per_node=4))
    for asked, words in ((dict(pp=3), ["pp=3", "nearest"]), (dict(ep=32), ["ep=32", "ep <= 16 experts"]), (dict(leaders="17", ep=16), ["leaders = 17"])):
        args = SimpleNamespace(**{"weights": str(case.sets["weights.file"]), "routing": case.routing, "machine": str(path), "dp": 0, "pp": 0,
                                  "ep": 0, "leaders": "all", "replicas": 0, "dtype": "fp32", "exchange": "flat", "output": None, **asked})
        refused(lambda: place_run.run(args), "sixteen.toml: 16 ranks", *words)


def test_what_does_not_fit_in_memory_is_refused(case):
    (case.folder / "small.toml").write_text(MACHINE.format(nodes=4, per_node=4).replace("memory_gib = 1.0", "memory_gib = 0.00001"))
    done = run_ranks(1, ["-m", "hpcmoe", "place", "--weights", case.sets["weights.file"], "--routing", case.routing, "--machine",
                         case.folder / "small.toml"])
    assert done.rc == 2 and "a leader's weights take" in done.err and len(done.err.splitlines()) == 1
