"""Rebalancing: experts take other seats while the job runs, and no token changes."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from local import choices, run_job, said, write_prompts
from mpi import run_ranks

LAYERS, EXPERTS, TOP_K = 4, 8, 2
EAGER = {"run.rebalance_every": 3, "run.rebalance_gb_per_s": 1e6}  # moving costs nothing: what is decided does not hang on timings


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A random model; two kinds of prompts, of few tokens each, one kind after the other; what one rank makes of them."""
    from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
    from hpcmoe.data.create import create
    folder = tmp_path_factory.mktemp("rebalance")
    model = ModelConfig("mixtral", 97, 32, LAYERS, AttentionConfig(4, 2, 8), RouterConfig(EXPERTS, TOP_K), ExpertConfig(24), 128)
    create(str(folder / "model.h5"), model, dtype="fp32", seed=5)
    rng = np.random.default_rng(3)
    kinds = [rng.choice([5, 6], (10, 12)), rng.choice([70, 71], (10, 12))]
    write_prompts(folder / "requests.jsonl", [p for kind in kinds for p in kind], max_tokens=[6 + i % 7 for i in range(20)], logprobs=1, ignore_eos=True)
    sets = {"weights.file": folder / "model.h5", "requests.file": folder / "requests.jsonl", "run.max_sequences": 8, "run.prefill_chunk": 4,
            "weights.backend": "numpy"}
    _, rows, report = run_job(1, folder, sets, name="base")
    assert "rebalancing" not in report
    return folder, sets, choices(rows), [layer["rows_per_expert"] for layer in report["expert_load"]["layers"]]


BOTH = pytest.mark.mpi  # the other MPI may differ
MATRIX = [
    (2, {"weights.backend": "auto"}, {}), pytest.param(4, {"run.lanes": 2, "run.micro_batches": 2}, {}, marks=BOTH),
    (6, {"layout.pp": 2, "layout.replicas": 4, "run.lanes": 2}, {}), pytest.param(8, {"layout.tp": 2, "layout.replicas": 4}, {}, marks=BOTH),
    (8, {"layout.dp": 2, "layout.leaders": 1, "run.max_sequences": 16}, {}),
    pytest.param(12, {"layout.ep": 12, "run.transport": "hierarchical", "layout.leaders": 5}, {"HPCMOE_RANKS_PER_NODE": "4"}, marks=BOTH),
    (16, {"layout.pp": 2, "layout.replicas": 8}, {}),
]


def words(value) -> str:
    return " ".join(f"{k.split('.')[1]}={x}" for k, x in value.items() if "." in k) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("ranks, more, env", MATRIX, ids=words)
def test_rebalancing_changes_no_token_and_is_listed(case, ranks, more, env):
    folder, sets, base, rows_le = case
    _, rows, report = run_job(ranks, folder, {**sets, **EAGER, **more}, env=env, timeout=400)
    for mine, want in zip(choices(rows), base, strict=True):
        assert mine["token_ids"] == want["token_ids"]
        np.testing.assert_allclose(mine["logprobs"]["token_logprobs"], want["logprobs"]["token_logprobs"], atol=1e-5)
    assert [layer["rows_per_expert"] for layer in report["expert_load"]["layers"]] == rows_le
    for r in report["per_rank"]:
        padded = more.get("weights.backend") == "auto"  # oneDNN's layout of so narrow weights
        assert padded or abs(r["weights_bytes"] - r["weights_predicted_bytes"]) <= 0.02 * r["weights_bytes"], r
    listed = report["rebalancing"]
    switched = [entry for entry in listed if entry["switch_step"] is not None]
    assert switched and any(entry["experts_moved"] for entry in switched)
    for entry in switched:
        assert entry["window_first_step"] < entry["decided_step"] < entry["switch_step"] and entry["decided_step"] % 3 == 0
        assert entry["heaviest_over_mean_after_predicted"] < entry["heaviest_over_mean_before_predicted"]
        assert entry["decision_to_switch_s"] > 0
        if entry["window_first_step"] == 0:  # nobody had moved yet; what is predicted splits rows evenly, leaders to within one row
            assert entry["heaviest_over_mean_before"] == pytest.approx(entry["heaviest_over_mean_before_predicted"], rel=0.1)


@pytest.mark.mpi
def test_a_rank_that_dies_while_weights_move_ends_the_job(case):
    """Round 3 decides, round 5 is the first that can have new seats: in round 4 weights are under way."""
    folder, sets, *_ = case
    done, *_ = run_job(4, folder, {**sets, **EAGER}, env={"HPCMOE_FAIL": "rank=2,step=4,how=kill"}, timeout=60, name="dies", check=False)
    assert done.rc not in (0, None) and not (folder / "dies-4" / "outputs.jsonl").exists()
    done, *_ = run_job(4, folder, {**sets, **EAGER}, env={"HPCMOE_FAIL": "rank=2,step=4,how=raise"}, timeout=60, name="dies", check=False)
    assert done.rc not in (0, None) and "HPCMOE_FAIL asked for this (rank 2" in done.err


def test_without_it_there_is_nothing_to_move_with(case):
    from local import job_config, run_local
    folder, sets, *_ = case
    _, session = run_local(job_config(sets["weights.file"], sets["requests.file"], folder / "local"))
    assert session.world.moving is None and not session.held.spares and not session.record.rebalancings


@pytest.mark.parametrize("ranks, more, words", [
    (2, {"run.rebalance_every": -1}, ["run.rebalance_every = -1", ">= 0"]),
    (2, {"run.rebalance_every": 2, "run.rebalance_gb_per_s": -0.5}, ["run.rebalance_gb_per_s = -0.5", ">= 0"]),
    (2, {"run.rebalance_every": "often"}, ["run.rebalance_every", "an integer"]),
    (2, {"run.rebalance_every": 2, "layout.pp": 2}, ["run.rebalance_every = 2", "one place holds all experts"]),
    (8, {"run.rebalance_every": 2}, ["run.rebalance_every = 2", "every place holds one expert", "layout.replicas"])])
def test_rebalancing_that_cannot_be_is_refused(case, ranks, more, words):
    folder, sets, *_ = case
    done, *_ = run_job(ranks, folder, {**sets, **more}, check=False, name="refused")
    assert done.rc == 2 and len(said(done)) == 1
    for word in words:
        assert word in done.err


# ---------------------------------------------------------------- decisions
@st.composite
def seatings(draw):
    """(old_s, new_s, slots_of_place, node_r): every expert somewhere in both."""
    experts, places = draw(st.integers(1, 7)), draw(st.integers(2, 5))
    slots_of_place = [draw(st.integers(1, 4)) for _ in range(places)]
    spare = sum(slots_of_place) - experts
    slots_of_place[-1] += max(0, -spare)
    seats = [draw(st.permutations(list(range(experts)) + draw(st.lists(st.integers(0, experts - 1), min_size=max(0, spare), max_size=max(0, spare)))))
             for _ in range(2)]
    return *seats, slots_of_place, draw(st.lists(st.integers(0, 1), min_size=places, max_size=places))


@given(seatings())
def test_every_place_gets_what_it_lacks_and_every_slot_its_expert(drawn):
    """Carried out with plain objects: an object is a list with the number of its expert, and a transfer writes one over a spare."""
    from hpcmoe.parallel.moves import transfers
    from hpcmoe.parallel.rebalance import seat_experts
    old_s, new_s, slots_of_place, node_r = drawn
    firsts = np.cumsum([0, *slots_of_place])
    old, new = ([list(seats[a:b]) for a, b in zip(firsts, firsts[1:])] for seats in (old_s, new_s))
    held, spares = [[[e] for e in place] for place in old], [[[-1] for _ in place] for place in old]
    sent = transfers(old_s, new_s, slots_of_place, node_r)
    assert all(t.source != t.target and t.expert in old[t.source] for t in sent)
    for r, place in enumerate(new):
        lacks = [e for e in set(place) for _ in range(place.count(e) - old[r].count(e))]
        able = [e for e in lacks if any(e in old[q] for q in range(len(old)) if q != r)]
        assert sorted(t.expert for t in sent if t.target == r) == sorted(able)
        arrived = []
        for t in sent:
            if t.target == r:
                spare = spares[r].pop()
                spare[0] = t.expert
                arrived.append((t.expert, spare))
        seats, free = seat_experts(old[r], place, held[r], arrived)
        assert [seat[0] for seat in seats] == place
        assert all(seat is was for seat, was, a, b in zip(seats, held[r], old[r], place) if a == b)
        assert not {id(f) for f in free} & {id(s) for s in seats}
        assert len(free) + len(spares[r]) >= len(place)  # as much memory for the next move


def test_sources_are_spread_and_near():
    from hpcmoe.parallel.moves import Transfer, transfers
    assert transfers([0, 0, 1, 2, 3, 4], [0, 0, 1, 0, 0, 0], [1] * 6, [0, 0, 0, 1, 1, 1]) == [
        Transfer(0, 0, 3), Transfer(0, 1, 4), Transfer(0, 0, 5)]
    assert transfers([0, 1, 2, 0], [0, 1, 0, 0], [1] * 4, [0, 1, 1, 1]) == [Transfer(0, 3, 2)]


def test_a_move_is_made_where_its_gain_beats_its_cost():
    """One slot per place, 3 experts, one spare slot on expert 1; expert 0 has 60 of 100 rows: its copy makes 60 rows 30, at one expert's weights."""
    from hpcmoe.parallel.moves import Price, decide
    old_s, rows_e, places, nodes = np.array([0, 1, 2, 1]), np.array([60.0, 20.0, 20.0]), np.ones(4, int), [0] * 4

    def decided(row_s, move_s, interval=1.0, rows_e=rows_e):
        return decide(4, old_s, rows_e, places, nodes, Price(row_s, move_s), interval)

    move = decided(0.1, 2.9)
    assert move.layer == 4 and move.new_s.tolist() == [0, 1, 2, 0] and len(move.transfers) == 1
    assert move.heaviest == (60 / 25, 30 / 25) and move.gain_s == pytest.approx(0.1) and move.cost_s == 2.9
    assert not decided(0.1, 3.1) and decided(0.1, 3.1, interval=2.0) and not decided(0.0, 0.0)
    assert not decided(0.1, 0.0, rows_e=np.zeros(3)) and not decided(0.1, 0.0, rows_e=np.array([20.0, 40.0, 20.0]))


@pytest.mark.mpi
def test_weights_in_other_layouts_are_refused(case):
    """One rank packs for another kind of CPU; both have the same products."""
    from hpcmoe.linear import backends
    if backends()["onednn"]:
        pytest.skip(backends()["onednn"])
    folder, sets, *_ = case
    arguments = ["run", "--quiet", "--output", str(folder / "mixed")]
    for key, value in {**sets, **EAGER, "weights.backend": "onednn"}.items():
        arguments += ["--set", f"{key}={value}"]
    done = run_ranks(2, f"""
        import os, sys
        if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1":
            os.environ["ONEDNN_MAX_CPU_ISA"] = "SSE41"
        from hpcmoe.cli import main
        sys.exit(main({arguments!r}))""", timeout=60)
    assert done.rc == 2 and "keep weights in different layouts" in done.err and len(said(done)) == 1
