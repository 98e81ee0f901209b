"""Lanes chosen by a trial, and `hpcmoe bench overlap`: their decisions, their arithmetic, what they run, what they refuse."""

import json
import time
from argparse import Namespace

import pytest

from hpcmoe.config import RunJob
from hpcmoe.errors import UserError
from hpcmoe.parallel.lanes import LaneTrial, open_cuts, rehearsed
from hpcmoe.parallel.layout import Layout
from hpcmoe.parallel.plan import Cut
from local import choices, run_job, write_prompts
from mpi import ROOT, run_ranks

ONE_NODE, TWO_NODES = ["a"] * 8, ["a"] * 4 + ["b"] * 4


# ---------------------------------------------------------------- the choice
@pytest.mark.parametrize("run, layout, nodes, on_gpu, expected", [
    ({}, (1, 1, 8), TWO_NODES, False, (Cut(1, 1), Cut(2, 2))),
    ({}, (1, 1, 8), ONE_NODE, False, None),                        # rows do not leave the node: one lane
    ({}, (1, 1, 8), ONE_NODE, True, (Cut(1, 1), Cut(2, 2))),       # a GPU works while its host moves rows
    ({}, (1, 2, 4), TWO_NODES, False, None),                       # each stage is on a node of its own
    ({}, (1, 2, 4), list("abababab"), False, (Cut(2, 1), Cut(4, 2))),
    ({}, (2, 4, 1), list("abababab"), True, None),                 # a place alone exchanges nothing
    ({"micro_batches": 3}, (1, 1, 8), TWO_NODES, False, (Cut(3, 1), Cut(3, 2))),
    ({"micro_batches": 1}, (1, 1, 8), TWO_NODES, True, None),      # nothing to interleave
    ({"lanes": 1}, (1, 1, 8), TWO_NODES, True, None), ({"lanes": 3}, (1, 1, 8), TWO_NODES, False, None),
    ({"schedule": "plain"}, (1, 1, 8), TWO_NODES, True, None),
])
def test_what_a_job_leaves_open(run, layout, nodes, on_gpu, expected):
    assert open_cuts(RunJob(**run), Layout(*layout), nodes, on_gpu) == expected


def test_both_ways_have_the_same_rows():
    assert rehearsed((Cut(2, 1), Cut(4, 2)), 7) == [[7], [4, 3]]
    assert rehearsed((Cut(3, 1), Cut(3, 2)), 7) == [[7, 7], [7, 7]]
    assert rehearsed((Cut(1, 1), Cut(2, 2)), 1) == [[1], [1, 0]]


@pytest.mark.parametrize("one, two, lanes", [(1.0, 0.94, 2), (1.0, 0.96, 1), (1.0, 1.5, 1)])
def test_two_lanes_have_to_be_clearly_quicker(one, two, lanes):
    assert LaneTrial(8, 2, one, two).lanes == lanes


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model of 4 experts that every token goes to, and 32 requests; what one rank makes of them."""
    from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
    from hpcmoe.data.create import create
    folder = tmp_path_factory.mktemp("lanes")
    model = ModelConfig("mixtral", 61, 16, 2, AttentionConfig(2, 2, 8), RouterConfig(4, 4), ExpertConfig(8), 64)
    create(str(folder / "model.h5"), model, dtype="fp32", seed=5)
    write_prompts(folder / "requests.jsonl", [[3 + i, 7] for i in range(32)], max_tokens=2, logprobs=1, ignore_eos=True)
    sets = {"weights.file": folder / "model.h5", "requests.file": folder / "requests.jsonl"}
    return folder, sets, choices(run_job(1, folder, sets)[1])


def job(case, name, byte_s, product_s, row_s, ranks=4, per_node=2, quiet=True, **more):
    """(Done, choices, report) on a network and experts of this speed."""
    folder, sets, _ = case
    arguments = [str(ROOT / "tests/programs/slow_network.py"), "run", *["--quiet"] * quiet, "--output", str(folder / name)]
    for key, value in {**sets, **{k.replace("_", ".", 1): v for k, v in more.items()}}.items():
        arguments += ["--set", f"{key}={value}"]
    times = {"HPCMOE_TEST_BYTE_S": str(byte_s), "HPCMOE_TEST_PRODUCT_S": str(product_s), "HPCMOE_TEST_ROW_S": str(row_s)}
    done = run_ranks(ranks, arguments, env={**times, "HPCMOE_RANKS_PER_NODE": str(per_node), "PYTHONPATH": str(ROOT)}).check()
    rows = [json.loads(line) for line in (folder / name / "outputs.jsonl").read_text().splitlines()]
    return done, choices(rows), json.loads((folder / name / "report.json").read_text())


@pytest.mark.mpi
def test_two_lanes_where_rows_can_travel_behind_products_and_one_where_a_product_costs_the_same_for_half_the_rows(case):
    """Real schedule, engine and MPI; 2 KB a way and lane. One lane takes twice 60 ms of messages and 96 ms of products in each layer,
    two, of half the bytes each, hide most of them behind the other's product."""
    *_, base = case
    for name, lanes, speed in (("hidden", 2, (30e-6, 0.0, 0.003)), ("bound", 1, (1e-6, 0.06, 0.0))):
        done, found, report = job(case, name, *speed, quiet=False, run_transport="pairwise")
        assert [c["token_ids"] for c in found] == [c["token_ids"] for c in base]
        tried, schedule = report["run"]["lane_trial"], report["run"]["schedule"]
        assert (tried["rows"], tried["layers"]) == (8, 2)
        assert (schedule["lanes"], schedule["micro_batches"]) == (lanes, lanes), (name, tried)
        assert LaneTrial(**tried).lanes == lanes
        line, = [text for text in done.err.splitlines() if "MoE layer" in text]
        assert line == (f"hpcmoe: lanes for 2 MoE layer(s) of 8 rows per leader: one {tried['one_lane_s'] * 1e3:.3g} ms, two "
                        f"{tried['two_lanes_s'] * 1e3:.3g} ms: {'two are' if lanes == 2 else 'one is'} taken")


@pytest.mark.mpi
def test_numbers_that_are_given_are_obeyed_and_a_single_row_is_not_shared(case):
    folder, sets, base = case
    env = {"HPCMOE_RANKS_PER_NODE": "1"}
    for name, more, lanes in (("given", {"run.lanes": 2}, 2), ("rows", {"run.batch_tokens": 2}, 1)):
        _, rows, report = run_job(2, folder, {**sets, "requests.limit": 4, **more}, env=env, name=name)
        assert report["run"]["lane_trial"] is None and report["run"]["schedule"]["lanes"] == lanes
        assert [c["token_ids"] for c in choices(rows)] == [c["token_ids"] for c in base[:4]]


# ---------------------------------------------------------------- what is booked
def test_posting_is_booked_to_the_op_whose_messages_are_posted_also_where_that_comes_later():
    """COUNTS is posted where it stands, DISPATCH while EXPERT stands there, since it waits for an event; each takes 20 ms."""
    from hpcmoe.device import Event
    from hpcmoe.parallel.engine import Engine
    from hpcmoe.parallel.handle import Handle, Waiter
    from hpcmoe.parallel.ops import Op, Step
    from hpcmoe.report.record import RankRecord

    class Later(Event):
        done = False

    later = Later()

    def post() -> list:
        time.sleep(0.02)
        return []

    def expert(op) -> None:
        later.done = True

    table = {"COUNTS": lambda op: Handle(post), "DISPATCH": lambda op: Handle(post, after=later), "EXPERT": expert, "COMBINE": lambda op: None}
    ops = [Op(kind, 0, 0) for kind in table]
    program = (*(Step(op, ()) for op in ops[:3]), Step(ops[3], (ops[1],)))
    record = RankRecord(0, "", 0, 0, 0, 0, True, [0], [0])
    Engine(program, table, Waiter(True, 1.0), record, time.monotonic, False, lambda number: None).run(lambda: False, lambda number: None)
    assert all(0.02 <= record.post_s[kind] <= record.busy_s[kind] < 1 for kind in ("COUNTS", "DISPATCH")) and "COMBINE" not in record.post_s
    assert record.busy_s["EXPERT"] < 0.02 and record.wait_s["DISPATCH"] < 0.02


# ---------------------------------------------------------------- what is rehearsed
@pytest.mark.mpi
@pytest.mark.parametrize("transport, per_node", [("pairwise", 1), ("hierarchical", 2)])
def test_a_rehearsal_makes_the_products_of_the_rows_that_were_sent(transport, per_node):
    """Every expert gets the rows that the made-up choices say, all ones, and its answers come back to the leader; layers in order."""
    run_ranks(4, f'''
        import numpy as np
        from mpi4py import MPI
        from hpcmoe.compute.base import Sizes
        from hpcmoe.compute.holdings import Holdings, Share
        from hpcmoe.compute.host import HostCompute
        from hpcmoe.config import *
        from hpcmoe.model.shard import Shard
        from hpcmoe.parallel.handle import Waiter
        from hpcmoe.parallel.layout import Layout
        from hpcmoe.parallel.rehearsal import Rehearsal
        from hpcmoe.parallel.world import World, node_names
        comm = MPI.COMM_WORLD
        world = World(comm, Layout(1, 1, 4, leaders="3"), 2, node_names(comm))
        world.transport = {transport!r}
        model = ModelConfig("m", 2, 8, 5, AttentionConfig(1, 1, 2), RouterConfig(8, 3), ExpertConfig(4), 1)
        mine, calls = list(world.layout.slots_of(comm.rank, 8)), []
        def expert(layer, e):
            def product(x_id, out):
                assert (x_id == 1).all()
                calls.append((layer, e, len(x_id)))
                out[:] = 10 * layer + e
            return product
        held = Holdings(experts={{(l, e): expert(l, e) for l in (3, 4) for e in mine}})
        compute = HostCompute(model, held, Sizes(2, 2, 0, 9, 0, 0, 0, 0), Share([3, 4], mine, True, True, True, Shard.of(model, 0, 1)), None, False)
        trial = Rehearsal(world, compute, model.router, [5, 4], 2, [3, 4], "overlapped", Waiter(True, 60.0))
        trial.run()
        chosen = comm.allgather([x.tolist() for x in trial.rows.expert_mtk] if comm.rank < 3 else [[], []])
        assert [[len(x) for x in rank] for rank in chosen] == [[5, 4]] * 3 + [[0, 0]]
        expected = [(layer, e, n) for layer in (3, 4) for m in (0, 1) for e in mine
                    if (n := sum(choice.count(e) for rank in chosen for choice in rank[m]))]
        assert calls == expected, (calls, expected)
        flights = trial.exchange.flights
        if comm.rank < 3 and {transport!r} != "hierarchical":
            for m, rows in enumerate(chosen[comm.rank]):
                assert flights[m].y_sd[:, 0].tolist() == [40.0 + e for e in sorted(e for choice in rows for e in choice)]
        calls.clear()
        trial.run(arithmetic=False)
        assert calls == []
        trial.products()
        assert calls == expected
        trial.close()
    ''', env={"HPCMOE_RANKS_PER_NODE": str(per_node)}).check()


# ---------------------------------------------------------------- the benchmark
OPTIONS = dict(transports="", rows="8,16", micro_batches="1,2", d=16, f=16, experts=0, top_k=2, layers=2, repeats=2, asleep_us=0.0, out="")


@pytest.mark.parametrize("change, words", [
    ({"transports": "pairwise,carrier pigeon"}, ["--transports", "carrier pigeon", "hierarchical"]),
    ({"rows": "8,x"}, ["--rows", "8,x", ">= 1"]), ({"rows": "0"}, ["--rows", ">= 1"]), ({"rows": "8,,9"}, ["--rows", "8,,9"]),
    ({"rows": "3", "micro_batches": "4"}, ["--rows", "3", "4"]), ({"micro_batches": "-1"}, ["--micro-batches", "-1"]),
    ({"d": 0}, ["--d", "0", ">= 1"]), ({"repeats": -2}, ["--repeats", "-2"]), ({"top_k": 5}, ["--top-k", "5", "4 experts"]),
    ({"asleep_us": -1.0}, ["--asleep-us", "-1.0"]), ({"asleep_us": float("nan")}, ["--asleep-us", "nan"]),
    ({"experts": 3}, ["--experts", "3", "4 ranks"]), ({"out": "/dev/null/x.json"}, ["/dev/null"]),
])
def test_impossible_options_are_refused(change, words):
    from hpcmoe.bench.overlap import asked
    with pytest.raises(UserError) as error:
        asked(Namespace(**{**OPTIONS, **change}), 4)
    assert all(word in str(error.value) for word in words), error.value


def test_overlap_as_osu_has_it():
    from hpcmoe.bench.overlap import overlap_percent
    assert overlap_percent(overall=10, compute=10, pure_communication=4) == 100
    assert overlap_percent(overall=13, compute=10, pure_communication=4) == 25
    assert overlap_percent(overall=15, compute=10, pure_communication=4) == 0  # never below
    assert overlap_percent(overall=9, compute=10, pure_communication=4) == 125  # nor clamped above, as there


@pytest.mark.mpi
def test_the_benchmark_measures_what_works_and_writes_it_down(tmp_path):
    out = tmp_path / "overlap.json"
    arguments = ["-m", "hpcmoe", "bench", "overlap", "--rows", "8", "--micro-batches", "1,2", "--d", "16", "--f", "16", "--repeats", "2",
                 "--asleep-us", "1000"]
    done = run_ranks(4, [*arguments, "--out", str(out)], env={"HPCMOE_RANKS_PER_NODE": "2"}).check()
    found = json.loads(out.read_text())
    assert [(p["transport"], p["micro_batches"]) for p in found["points"]] == [
        (name, m) for name in ("ialltoallv", "pairwise", "staged", "hierarchical") for m in (1, 2)]
    assert len(done.out.splitlines()) == 2 + len(found["points"])
    for point in found["points"]:
        overall, compute, pure = (point[f"{name}_ms"] for name in ("overall", "compute", "pure_communication"))
        assert overall >= 32 and compute >= 32 and pure > 0  # 2 layers; 8 rows of each of 4 leaders, each to 2 of 4 experts: 16 ms a layer
        assert point["overlap_percent"] == pytest.approx(max(0, 100 - 100 * (overall - compute) / pure))
        assert {name for name in point if not name.endswith(("_ms", "_percent"))} == {"transport", "rows_per_leader", "micro_batches", "speed_up"}
    assert found["run"]["ranks"] == 4 and found["run"]["experts"] == 4 and len(set(found["run"]["hosts"])) == 2
    alone = run_ranks(1, arguments)
    assert alone.rc == 2 and "expected at least 2" in alone.err and alone.err.count("\n") == 1
