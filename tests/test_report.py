"""Reports: figures against closed forms and brute force, the table, comparison, files, docs."""

import argparse
import copy
import itertools
import json
import random
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.config import JobConfig
from hpcmoe.errors import UserError
from hpcmoe.report import compare, report_cli, table
from hpcmoe.report.expert_load import expert_load
from hpcmoe.files import replacing
from hpcmoe.report.metrics import metrics, prefill_and_decode_s
from hpcmoe.report.reading import read_report
from hpcmoe.report.predicted import predicted
from hpcmoe.report.record import KINDS, MOVES, RankRecord, Rebalancing, RequestTimes, Seated, StepRow

DOCS = Path(__file__).parent.parent / "docs" / "report.md"
FACTS = {
    "task": "generate", "layout": {"dp": 1, "pp": 1, "ep": 2, "tp": 1}, "leaders": "all",
    "layout_reason": "one expert per rank", "sequences_at_once": 64, "context_tokens": 256,
    "schedule": {"name": "overlapped", "micro_batches": 2, "lanes": 2}, "gpus": [], "gpu_work": {"kernels": 0, "products": 0, "graph_replays": 0},
    "transport": "pairwise", "dtype": "fp32", "threads": 1,
    "linear": {"backend": "numpy", "version": "2"},
    "mpi": {"vendor": "MPICH", "version": "5", "threads": "multiple"},
    "versions": {"hpcmoe": "0", "python": "3", "numpy": "2", "h5py": "3", "mpi4py": "4"},
    "model": {"file": "m.h5", "family": "mixtral", "layers": 1, "experts": 3, "top_k": 2,
              "d": 8, "f": 16, "vocab": 32},
    "lane_trial": {"rows": 8, "layers": 2, "one_lane_s": 0.25, "two_lanes_s": 0.125},
    "startup_s": 1.5, "weights_file_bytes": 1000, "errors": 1, "bubble_predicted_share": 0.05, "config": asdict(JobConfig()),
}

PLACED = FACTS | {"placement": {"file": "p.json", "top_k": 2, "expert_of_slot": [[2, 0, 1]], "predicted": [
    {"flat_between_nodes": 0.75, "flat_busiest_link": 0.5, "hierarchical_between_nodes": 0.5, "hierarchical_busiest_link": 0.25,
     "busiest_rank": 1.5}]}}


def rank_record(rank, stage=0, place=0, **fields) -> RankRecord:
    values = dict(rank=rank, host=f"node{rank // 2}", node=rank // 2, dp=0, stage=stage,
                  place=place, leader=True, layers=[stage], slots=[place])
    return RankRecord(**(values | fields))


def two_ranks() -> list[RankRecord]:
    """A run of 10 s whose every figure can be worked out by hand."""
    first = rank_record(
        0, slots=[0, 2], run_s=10.0, busy_s={"ATTEND": 2.0, "GATE": 0.5, "EXPERT": 4.0},
        wait_s={"COUNTS": 0.5, "DISPATCH": 1.0, "COMBINE": 0.5, "RECV": 0.25},
        post_s={"COUNTS": 0.125, "DISPATCH": 0.25, "SAMPLE": 7.0},
        steps=[StepRow(0, 0, 0.0, 2.0, 30, 0), StepRow(1, 0, 2.0, 4.0, 10, 10),
               StepRow(2, 0, 4.0, 8.0, 0, 20)],
        requests=[RequestTimes(1, 30, 3, 1.0, 3.0, 7.0), RequestTimes(2, 10, 1, 0.0, 2.0, 2.0)],
        rows_own={"DISPATCH": 5}, rows_intra={"DISPATCH": 20, "COMBINE": 15},
        bytes_intra={"DISPATCH": 640, "COMBINE": 480}, rows_inter={"SEND": 2},
        bytes_inter={"SEND": 64},
        load=np.array([[[4, 0]], [[2, 2]], [[0, 0]]]), weights_bytes=100, kv_bytes=10,
        buffer_bytes=7, peak_rss_bytes=900, load_s=0.5, bytes_read=800, expert_rows=8,
        expert_flop=6e9)
    second = rank_record(
        1, place=1, run_s=9.0, busy_s={"ATTEND": 1.0, "EXPERT": 2.0},
        wait_s={"COUNTS": 3.0, "COMBINE": 1.0},
        requests=[RequestTimes(0, 20, 5, 0.0, 1.0, 9.0)],
        rows_intra={"DISPATCH": 10}, bytes_intra={"DISPATCH": 320},
        load=np.array([[[8]]]), weights_bytes=50, kv_bytes=10, buffer_bytes=7,
        peak_rss_bytes=700, load_s=0.25, bytes_read=400, expert_rows=8, expert_flop=6e9)
    return [first, second]


def leaves(value, path=()):
    """(path, leaf) of nested dicts and lists; positions in lists are no names."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from leaves(part, path + (name,))
    elif isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        for part in value:
            yield from leaves(part, path)
    else:
        yield path, value


def undocumented(report: dict) -> set[str]:
    """Names in a report that docs/report.md does not list; `config` is the job's own."""
    listed = set(re.findall(r"`([a-z0-9_]+)`", DOCS.read_text()))
    return {name for path, _ in leaves(report) if path[0] != "config"
            for name in path if name not in listed}


# ---------------------------------------------------------------- figures in closed form
def test_top_level_names_of_vllm():
    report = metrics(two_ranks(), FACTS)
    assert report["elapsed_time"] == 10.0
    assert report["num_requests"] == 3
    assert report["total_num_tokens"] == 60 + 9
    assert report["requests_per_second"] == pytest.approx(0.3)
    assert report["tokens_per_second"] == pytest.approx(6.9)
    assert report["requests"] == {"finished": 3, "failed": 1}
    assert report["run"]["hosts"] == ["node0"] and report["run"]["nodes"] == 1
    assert report["run"]["ranks"] == 2 and report["config"]["task"] == "generate"


def test_throughput():
    t = metrics(two_ranks(), FACTS)["throughput"]
    assert (t["prompt_tokens"], t["output_tokens"]) == (60, 9)
    assert t["output_tokens_per_s"] == pytest.approx(0.9)
    assert t["output_tokens_per_s_per_rank"] == pytest.approx(0.45)
    # steps: 2 s prefill, 2 s half and half, 4 s decode, stretched from 8 s to the run's 10 s
    assert t["prefill_s"] == pytest.approx(3.75) and t["decode_s"] == pytest.approx(6.25)
    assert t["prefill_tokens_per_s"] == pytest.approx(40 / 3.75)
    assert t["decode_tokens_per_s_per_rank"] == pytest.approx(30 / 6.25 / 2)


def test_latency():
    latency = metrics(two_ranks(), FACTS)["latency"]
    assert latency["ttft_mean_ms"] == pytest.approx(2000)
    assert latency["ttft_admitted_mean_ms"] == pytest.approx((2000 + 2000 + 1000) / 3)
    # the request with one output token has no TPOT; the others 4/2 s and 8/4 s
    assert latency["tpot_mean_ms"] == pytest.approx(2000)
    assert latency["tpot_p99_ms"] == pytest.approx(2000)
    assert latency["request_p50_ms"] == pytest.approx(7000)
    assert latency["request_p90_ms"] == pytest.approx(7000 + 0.8 * 2000)


def test_phases_and_communication():
    report = metrics(two_ranks(), FACTS)
    phases, comm = report["phases"], report["communication"]
    assert phases["attention"] == {"mean_s": 1.5, "min_s": 1.0, "max_s": 2.0, "share": 0.15,
                                   "busy_s": 1.5, "wait_s": 0.0, "gpu_s": 0.0}
    assert phases["counts"]["mean_s"] == 1.75 and phases["counts"]["wait_s"] == 1.75
    # rank 0: 0.25 s of RECV and 10 - 8.75 s unaccounted; rank 1: 10 - 7 s
    assert phases["idle"]["min_s"] == pytest.approx(1.5)
    assert phases["idle"]["max_s"] == pytest.approx(3.0)
    assert phases["recv"]["mean_s"] == 0
    assert sum(p["share"] for p in phases.values()) == pytest.approx(1)
    # rank 0: 2 s of waiting (RECV's is the bubble) and 0.125 + 0.25 s of posting (SAMPLE's is none of it); rank 1: 4 s of waiting
    assert comm["exposed_comm_min_s"] == 2.375 and comm["exposed_comm_max_s"] == 4.0 and comm["exposed_comm_s"] == 6.375
    assert comm["exposed_wait_mean_s"] == 3.0 and comm["exposed_post_mean_s"] == 0.1875
    assert comm["exposed_comm_share"] == pytest.approx(0.31875)
    assert [r["exposed_comm_s"] for r in report["per_rank"]] == [2.375, 4.0]
    assert [r["exposed_post_s"] for r in report["per_rank"]] == [0.375, 0.0]
    # rank 0 waits 0.25 s for another stage, rank 1 ends 1 s before its replica
    assert comm["bubble_s"] == pytest.approx(0.625) and comm["bubble_share"] == pytest.approx(0.0625)
    assert comm["bubble_predicted_share"] == 0.05
    assert comm["expert_share_of_moe"] == pytest.approx(6 / 12.5)
    assert report["compute"]["expert_gflop_per_s_per_rank"] == pytest.approx(2.0)


def test_bubble_and_exposure_of_leaders_only():
    records = two_ranks()
    records[1].leader = False
    comm = metrics(records, FACTS)["communication"]
    assert comm["bubble_s"] == 0.25
    assert comm["exposed_comm_leaders_share"] == pytest.approx(0.2375)
    assert comm["exposed_comm_share"] == pytest.approx(0.31875)


def test_traffic_memory_loading():
    report = metrics(two_ranks(), FACTS)
    assert report["traffic"]["dispatch"] == {
        "rows_own": 5, "rows_within_nodes": 30, "rows_between_nodes": 0,
        "bytes_within_nodes": 960, "bytes_between_nodes": 0}
    assert report["traffic"]["total"] == {"bytes_within_nodes": 1440, "bytes_between_nodes": 64,
                                          "bytes_per_token": 1504 / 70}
    assert report["memory"]["weights_mean_bytes"] == 75
    assert report["memory"]["peak_rss_max_bytes"] == 900
    assert report["loading"]["read_over_file"] == pytest.approx(1.2)
    assert report["loading"]["read_bytes_per_s"] == pytest.approx(2400)
    assert [r["read_bytes"] for r in report["per_rank"]] == [800, 400]


def test_expert_load_of_unequal_ranks():
    """Experts 0 and 2 on a rank with three rounds, expert 1 on one with a single round."""
    load = expert_load(two_ranks())
    layer, = load["layers"]
    assert layer["rows_per_expert"] == [6, 8, 2] and layer["busiest_expert"] == 1
    assert layer["max_over_mean_run"] == pytest.approx(8 / (16 / 3))
    # round 0: 4, 8, 0; round 1: 2, 0, 2; round 2 has no rows and says nothing
    assert layer["max_over_mean_steps"] == pytest.approx((8 / 4 + 2 / (4 / 3)) / 2)
    assert layer["rank_max_over_mean_run"] == 1.0
    assert load["max_over_mean_run_max"] == layer["max_over_mean_run"]


def test_an_empty_run_has_no_figures_but_a_report():
    report = metrics([rank_record(0)], {})
    assert report["tokens_per_second"] is None
    assert report["latency"]["tpot_mean_ms"] is None
    assert report["expert_load"]["layers"] == []
    assert "nan" not in json.dumps(report).lower()
    assert "TPOT" in table.render(report)


def test_impossible_records_are_refused():
    with pytest.raises(ValueError, match="at least one rank"):
        metrics([], FACTS)
    records = two_ranks()
    records[1].requests[0].index = 1
    with pytest.raises(ValueError, match="same request"):
        metrics(records, FACTS)


# ---------------------------------------------------------------- prefill and decode apart
def test_overlapping_steps_share_the_time():
    """Prefill in [0, 2], decode in [1, 3]: each has 1 s alone and half of the second between."""
    record = rank_record(0, steps=[StepRow(0, 0, 0, 2, 8, 0), StepRow(0, 1, 1, 3, 0, 4)])
    assert prefill_and_decode_s([record], 3.0) == pytest.approx((1.5, 1.5))


def test_leaders_of_a_step_are_one_step_and_replicas_are_averaged():
    def leader(rank, dp, prefill, decode):
        return rank_record(rank, dp=dp, steps=[StepRow(0, 0, 0, 1, prefill, decode)])
    assert prefill_and_decode_s([leader(0, 0, 3, 0), leader(1, 0, 0, 1)], 1.0) == \
        pytest.approx((0.75, 0.25))
    assert prefill_and_decode_s([leader(0, 0, 3, 0), leader(1, 1, 0, 1)], 1.0) == \
        pytest.approx((0.5, 0.5))


steps_drawn = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10), st.integers(0, 5),
                                 st.integers(0, 5)), min_size=1, max_size=12)


@given(steps_drawn)
def test_division_equals_a_walk_over_unit_intervals(drawn):
    record = rank_record(0, steps=[StepRow(i, 0, start, start + length, prefill, decode)
                                   for i, (start, length, prefill, decode) in enumerate(drawn)])
    parts = {"prefill": 0.0, "decode": 0.0}
    for instant in range(31):
        running = [s for s in record.steps if s.prefill_rows + s.decode_rows
                   and s.start_s <= instant < s.end_s]
        for s in running:
            rows = s.prefill_rows + s.decode_rows
            parts["prefill"] += s.prefill_rows / rows / len(running)
            parts["decode"] += s.decode_rows / rows / len(running)
    total = sum(parts.values())
    expected = (0, 0) if not total else (parts["prefill"] / total * 31, parts["decode"] / total * 31)
    assert prefill_and_decode_s([record], 31.0) == pytest.approx(expected)


# ---------------------------------------------------------------- invariants
seconds = st.floats(0, 5, allow_nan=False)


@st.composite
def runs(draw):
    """Random records: several ranks, replicas, rounds and experts, requests spread over ranks."""
    ranks, experts, layers = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    records, index = [], itertools.count()
    for rank in range(ranks):
        held = list(range(experts))[rank % experts::2] or [0]
        busy = {kind: draw(seconds) for kind in draw(st.sets(st.sampled_from(KINDS)))}
        wait = {kind: draw(seconds) for kind in draw(st.sets(st.sampled_from(KINDS)))}
        rounds = draw(st.integers(0, 4))
        requests = []
        for _ in range(draw(st.integers(0, 4))):
            first, more = draw(seconds), draw(seconds)
            requests.append(RequestTimes(next(index), draw(st.integers(1, 9)),
                                         draw(st.integers(0, 9)), first / 2, first, first + more))
        steps = [StepRow(i, 0, i * 1.0, i + 1.0, int(rng.integers(5)), int(rng.integers(5)))
                 for i in range(rounds)]
        records.append(rank_record(
            rank, dp=draw(st.integers(0, 1)), layers=list(range(layers)), slots=held,
            run_s=sum(busy.values()) + sum(wait.values()) + draw(seconds), busy_s=busy,
            wait_s=wait, requests=requests, steps=steps,
            rows_intra={kind: int(rng.integers(99)) for kind in MOVES},
            load=rng.integers(0, 4, (rounds, layers, len(held))), bytes_read=int(rng.integers(99))))
    return records


@settings(max_examples=60, deadline=None)
@given(runs(), st.randoms())
def test_invariants(records, shuffler: random.Random):
    report = metrics(records, FACTS)
    if report["elapsed_time"]:
        assert sum(p["share"] for p in report["phases"].values()) == pytest.approx(1)
        t = report["throughput"]
        assert t["prefill_s"] + t["decode_s"] == pytest.approx(t["elapsed_s"]) or \
            t["prefill_s"] == t["decode_s"] == 0
    for phase in report["phases"].values():
        assert phase["min_s"] - 1e-9 <= phase["mean_s"] <= phase["max_s"] + 1e-9
    for name in ("ttft", "ttft_admitted", "tpot", "request"):
        p50, p90, p99 = (report["latency"][f"{name}_{p}_ms"] for p in ("p50", "p90", "p99"))
        assert p50 is None or 0 <= p50 <= p90 <= p99
    for layer in report["expert_load"]["layers"]:
        for name in ("max_over_mean_run", "max_over_mean_steps", "rank_max_over_mean_run"):
            assert layer[name] >= 1 - 1e-12
    shuffled = copy.deepcopy(records)
    shuffler.shuffle(shuffled)
    assert json.dumps(metrics(shuffled, FACTS)) == json.dumps(report)
    assert table.render(report)


@settings(max_examples=60, deadline=None)
@given(runs())
def test_expert_load_equals_a_plain_loop(records):
    load = expert_load(records)
    for layer in load["layers"]:
        counts = {}  # (replica, round, expert) -> rows
        experts = sorted({e for r in records if r.load.size for e in r.slots})
        for r in records:
            for step, expert in itertools.product(range(len(r.load)), range(len(r.slots))):
                key = (r.dp, step, r.slots[expert])
                counts[key] = counts.get(key, 0) + int(r.load[step, layer["layer"], expert])
        totals = [sum(n for key, n in counts.items() if key[2] == e) for e in experts]
        assert layer["rows_per_expert"] == totals
        ratios = []
        for dp, step in {key[:2] for key in counts}:
            rows = [counts.get((dp, step, e), 0) for e in experts]
            if sum(rows):
                ratios.append(max(rows) * len(rows) / sum(rows))
        assert layer["max_over_mean_steps"] == pytest.approx(sum(ratios) / len(ratios))


def test_rows_of_copies_count_for_their_expert_whatever_slot_they_were_in():
    """Two places; slot 1 of rank 0 holds a copy of expert 2 in step 0, of expert 0 from step 1 on; a step of rank 0 without rows."""
    first = rank_record(0, slots=[0, 1], load=np.array([[[4, 1]], [[1, 1]], [[0, 0]]]),
                        seated=[Seated(0, np.array([[0, 2]])), Seated(1, np.array([[0, 0]]))])
    second = rank_record(1, place=1, slots=[2, 3], load=np.array([[[2, 1]], [[3, 1]], [[0, 0]]]), seated=[Seated(0, np.array([[1, 2]]))])
    layer, = expert_load([second, first])["layers"]
    assert layer["rows_per_expert"] == [6, 5, 3] and layer["copies_per_expert"] == [2, 1, 1]
    assert layer["max_over_mean_steps"] == pytest.approx((4 * 3 / 8 + 3 * 3 / 6) / 2)
    assert layer["balancedness_run"] == pytest.approx(7 / 7) and layer["rank_max_over_mean_run"] == pytest.approx(1)
    assert layer["balancedness_steps"] == pytest.approx((4 / 5 + 3 / 4) / 2)
    report = metrics([first, second], FACTS)["per_rank"]
    assert [r["experts"] for r in report] == [[[0, 0]], [[1, 2]]] and [r["slots"] for r in report] == [[0, 1], [2, 3]]


# ---------------------------------------------------------------- the table
def big_run(ranks: int = 64, layers: int = 48) -> list[RankRecord]:
    rng = np.random.default_rng(0)
    records = []
    for rank in range(ranks):
        record = rank_record(
            rank, place=rank, layers=list(range(layers)), slots=[rank], run_s=1234.5,
            busy_s={k: 50.0 for k in KINDS}, wait_s={k: 1.25 for k in KINDS},
            load=rng.integers(1, 9, (3, layers, 1)), weights_bytes=70 << 30, bytes_read=70 << 30)
        for name in ("rows_own", "rows_intra", "rows_inter", "bytes_intra", "bytes_inter"):
            setattr(record, name, {k: 123_456_789_012 for k in MOVES})
        records.append(record)
    records[0].requests = [RequestTimes(i, 1000, 100, 0.0, 1.0, 900.0 + i) for i in range(200)]
    records[0].steps = [StepRow(i, 0, i, i + 1.0, 0, 64) for i in range(1200)]
    return records


def test_table_fits_a_page():
    lines = table.render(metrics(big_run(), FACTS)).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) <= 60
    assert any("all layers, max" in line for line in lines)
    dispatch = next(line.split() for line in lines if line.startswith("  dispatch  ")
                    and "TiB" in line)
    assert dispatch == ["dispatch", *["7.901e+12"] * 3, "7.2", "TiB", "7.2", "TiB"]
    assert any("64 on 32 nodes: node0, node1, node2" in line for line in lines)


def test_table_says_what_the_report_says():
    text = table.render(metrics(two_ranks(), FACTS))
    rows = {line[:20].strip(): line[20:].split() for line in text.splitlines()}
    assert rows["output"] == ["9", "10.00", "0.9000", "0.4500"]
    assert rows["TPOT"] == ["2,000"] * 4
    assert rows["expert"][:3] == ["30.0", "%", "3.000"]
    assert rows["layer 0"] == ["16", "8", "5.333", "1.500", "1.750", "0"]
    assert "lanes 2 (MoE layers on one lane 0.2500 s, on two 0.1250 s)" in " ".join(text.split())
    assert "exposed communication 31.9 % (waiting 3.000 s, posting 0.1875 s per rank)" in " ".join(text.split()) and "MPICH 5" in text
    assert "800 B read by a rank, 1.2 KiB by all = 1.20 x the file" in " ".join(text.split())


@pytest.mark.parametrize("value, text", [
    (None, "-"), (0, "0"), (0.0, "0"), (12, "12"), (1234567, "1,234,567"), (0.5, "0.5000"),
    (3.14159, "3.142"), (99.99, "99.99"), (12345.678, "12,346"), (0.00001, "1.0e-05"),
    (-2.5, "-2.500")])
def test_numbers(value, text):
    assert table.number(value) == text


@pytest.mark.parametrize("value, text", [(None, "-"), (0, "0 B"), (1023, "1023 B"),
                                         (1536, "1.5 KiB"), (5 << 40, "5.0 TiB"),
                                         (1 << 60, "1048576.0 TiB")])
def test_sizes(value, text):
    assert table.size(value) == text


# ---------------------------------------------------------------- files
def test_report_round_trip(tmp_path):
    report = metrics(two_ranks(), FACTS | {"layout": {"dp": np.int64(1)}, "where": tmp_path})
    path = table.write_report(tmp_path / "new" / "folder", report)
    assert path.name == "report.json" and [p.name for p in path.parent.iterdir()] == ["report.json"]
    again = read_report(path.parent)
    assert again["run"]["layout"] == {"dp": 1} and again["run"]["where"] == str(tmp_path)
    assert again["throughput"] == report["throughput"]
    assert table.render(again) == table.render(report)


def test_report_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file: expected a folder"):
        table.write_report(tmp_path / "file", metrics(two_ranks(), FACTS))
    (tmp_path / "taken" / "report.json").mkdir(parents=True)
    with pytest.raises(UserError, match="report.json: cannot be written: Is a directory"):
        table.write_report(tmp_path / "taken", metrics(two_ranks(), FACTS))
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["report.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path, error):
    target = tmp_path / "out.json"
    target.write_text("old")
    with pytest.raises((error, UserError)):
        with replacing(target) as temporary, open(temporary, "w") as file:
            file.write("half")
            file.flush()
            raise error
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_full_disk(tmp_path):
    """/dev/full refuses every write as a full disk does."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(UserError, match="No space left"):
        with replacing(tmp_path / "out.json") as temporary, open(temporary, "w"), open(full, "w") as file:
            file.write("x" * 100_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, message", [
    ("", "not JSON"), ("[]", "not a report: format"), ("{}", "not a report: format"),
    ("\ufeff{", "not JSON"), ('{"format": NaN}', "NaN is not a number"),
    ('{"format": "hpcmoe-report", "format_version": 99}', "format_version = 99: expected 1"),
    ('{"format": "hpcmoe-report", "format_version": 1}', "elapsed_time is missing")])
def test_files_that_are_no_reports(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_report(path)
    assert str(path) in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="cannot read the report: No such file"):
        read_report(tmp_path / "none.json")
    with pytest.raises(UserError, match="report.json: cannot read"):
        read_report(tmp_path)


def test_every_field_is_needed_or_unused(tmp_path):
    """Whatever single field is taken away, the reader names it or the table does without."""
    whole = json.loads(json.dumps(metrics(two_ranks(), FACTS)))
    named = 0
    for path in sorted({path for path, _ in leaves(whole) if path[0] != "config"}):
        report = copy.deepcopy(whole)
        inner = report
        for name in path[:-1]:
            inner = inner[name]
            inner = inner[0] if isinstance(inner, list) else inner
        del inner[path[-1]]
        (tmp_path / "report.json").write_text(json.dumps(report))
        try:
            again = read_report(tmp_path)
        except UserError as error:
            assert path[-1] in str(error)
            named += 1
        else:
            assert table.render(again) and compare.render([again, whole])
    assert named > 100


wrong = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                     lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                     max_leaves=4)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzzed_reports_never_crash(tmp_path_factory, data):
    report = json.loads(json.dumps(metrics(two_ranks(), FACTS)))
    paths = sorted({path[:n] for path, _ in leaves(report) for n in range(1, len(path) + 1)})
    path = data.draw(st.sampled_from(paths))
    inner = report
    for name in path[:-1]:
        inner = inner[name]
        inner = inner[0] if isinstance(inner, list) else inner
    inner[path[-1]] = data.draw(wrong)
    file = tmp_path_factory.mktemp("fuzz") / "report.json"
    file.write_text(json.dumps(report))
    try:
        again = read_report(file)
    except UserError as error:
        assert str(file) in str(error)
    else:
        assert table.render(again) and compare.render([again, again])


# ---------------------------------------------------------------- comparison
def scaled(ranks: int, elapsed: float) -> dict:
    records = [rank_record(r, place=r, run_s=elapsed) for r in range(ranks)]
    records[0].requests = [RequestTimes(0, 60, 40, 0.0, 1.0, elapsed)]
    return metrics(records, FACTS)


def test_parallel_efficiency():
    """Four times the ranks, half the time: half the tokens/s per rank."""
    one, four = scaled(1, 8.0), scaled(4, 4.0)
    assert compare.efficiency(four, one) == pytest.approx(0.5)
    assert compare.efficiency(four, one, "prefill") is None
    rows = {line[:28].strip(): line[28:].split()
            for line in compare.render([one, four], ["a", "b"]).splitlines()}
    assert rows["total tokens/s"] == ["12.50", "25.00", "2.00x"]
    assert rows["per rank: total tokens/s"] == ["12.50", "6.250"]
    assert rows["parallel efficiency, total"] == ["1.00", "0.500"]
    assert rows["parallel efficiency, prefill"] == ["-", "-"]
    assert rows["elapsed, s"] == ["8.000", "4.000", "0.50x"]


def test_comparison_of_many_runs_and_of_different_work():
    reports = [metrics(big_run(4, 2), FACTS), *(scaled(n, 1.0) for n in range(1, 9))]
    text = compare.render(reports)
    assert max(map(len, text.splitlines())) <= 100
    assert all(f"#{i}" in text for i in range(1, 10))
    assert "their numbers of tokens differ" in text
    assert "their numbers of tokens differ" not in compare.render(reports[:1] * 2)


# ---------------------------------------------------------------- the sub-command
def run_cli(*words: str) -> int:
    parser = argparse.ArgumentParser()
    report_cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["report", *words])
    return args.handler(args)


def test_sub_command(tmp_path, capsys):
    for name, report in (("one", scaled(1, 8.0)), ("four", scaled(4, 4.0))):
        table.write_report(tmp_path / name, report)
    one, four = str(tmp_path / "one"), str(tmp_path / "four" / "report.json")
    assert run_cli(one) == 0
    assert "Throughput" in capsys.readouterr().out
    assert run_cli(one, four) == 0
    assert "parallel efficiency, total" in capsys.readouterr().out
    assert run_cli("--json", one) == 0
    assert json.loads(capsys.readouterr().out) == scaled(1, 8.0)
    assert run_cli("--json", one, four) == 0
    assert [r["run"]["ranks"] for r in json.loads(capsys.readouterr().out)] == [1, 4]
    with pytest.raises(UserError, match="at least one report.json"):
        run_cli()
    with pytest.raises(SystemExit) as done:
        run_cli("--help")
    assert done.value.code == 0 and "hpcmoe report hpcmoe-out" in capsys.readouterr().out


def test_a_placement_beside_its_prediction():
    """8 tokens; two nodes; experts by their own numbers."""
    first, second = two_ranks()
    first.layer_inter = {("DISPATCH", 0): 5, ("COMBINE", 0): 7, ("SEND", 0): 99}
    second.layer_inter, second.node = {("DISPATCH", 0): 3, ("COMBINE", 0): 1}, 1
    first.seated, second.seated = [Seated(0, np.array([[2, 1]]))], [Seated(0, np.array([[0]]))]
    report = metrics([second, first], PLACED)
    assert report["placement"]["layers"] == [{
        "layer": 0, "tokens": 8, "rows_between_nodes": 8, "rows_between_nodes_predicted": 6.0, "rows_busiest_link": 7,
        "rows_busiest_link_predicted": 4.0, "rows_busiest_rank": 8, "rows_busiest_rank_predicted": 12.0}]
    load, = report["expert_load"]["layers"]
    assert load["rows_per_expert"] == [8, 2, 6] and load["busiest_expert"] == 0
    assert "6 / 8" in table.render(report) and "12 / 8" in table.render(report)
    hierarchical = metrics([first, second], PLACED | {"transport": "hierarchical"})["placement"]
    assert hierarchical["exchange"] == "hierarchical" and hierarchical["layers"][0]["rows_between_nodes_predicted"] == 4.0
    elsewhere = metrics([first, second], PLACED | {"placement": PLACED["placement"] | {"predicted": None}})
    assert elsewhere["placement"]["layers"][0]["rows_busiest_link_predicted"] is None and "- / 7" in table.render(elsewhere)
    replicas = metrics([first, replace(second, dp=1)], PLACED)["placement"]["layers"][0]
    assert replicas["rows_busiest_link"] == 8  # the first node of each replica


# ---------------------------------------------------------------- the docs
def rebalanced() -> list[RankRecord]:
    """Layer 0 took other seats after step 1: window 0 to 1; another time decided, but the run was over before."""
    first, second = two_ranks()
    first.rebalancings = [Rebalancing(0, 0, 1, 2.0, 1, 96, 1.5, 1.25, 0.5, 0.25, 1, 4.5), Rebalancing(0, 1, 3, 9.0, 1, 96, 2.0, 1.0, 1.0, 0.0)]
    second.load = np.array([[[8]], [[1]], [[0]]])
    return [first, second]


SIMULATED = {"cluster": "pretend", "cluster_file": "p.toml", "calibration": "a core", "calibration_source": "measured", "load": "uniform",
             "warnings": [], "transport_trial": {"rows": 8, "flat_s": 0.002, "hierarchical_s": 0.001}, "gpu_s_per_million_output_tokens": 1235.0, "memory_bytes": 2**30, "memory_used_max_bytes": 2**29,
             "busiest_link": {"kind": "port in", "number": 3, "nbytes": 1e6, "busy_s": 2.5, "busy_share": 0.25}}
REBALANCED = PLACED | {"simulated": SIMULATED, "config": {"run": {"rebalance_every": 1, "capacity_factor": 1.5, "over_capacity": "reroute"}}}


def test_rows_that_a_capacity_factor_turned_away_are_counted():
    """By layer over all leaders; tokens of a placement are those that the router saw, with or without rows."""
    first, second = two_ranks()
    first.over_capacity, second.over_capacity = {0: [3, 1], 1: [0, 0]}, {0: [2, 3]}
    assert metrics([first, second], REBALANCED)["capacity"] == {
        "capacity_factor": 1.5, "over_capacity": "reroute", "changes_results": True, "rerouted_rows": 5, "dropped_rows": 4, "layers": [
            {"layer": 0, "rerouted_rows": 5, "dropped_rows": 4}, {"layer": 1, "rerouted_rows": 0, "dropped_rows": 0}]}
    assert "1.500 changes results: 5 rows rerouted, 4 dropped" in table.render(metrics([first, second], REBALANCED))
    assert "capacity" not in metrics([first, second], PLACED)
    before, after = (metrics(records, PLACED)["placement"]["layers"][0]["tokens"] for records in (two_ranks(), [first, second]))
    assert after == before + 4 // PLACED["placement"]["top_k"]


def test_a_simulation_says_so():
    assert "SIMULATED" not in table.render(metrics(two_ranks(), FACTS))
    text = " ".join(table.render(metrics(two_ranks(), FACTS | {"simulated": SIMULATED})).split())
    for words in ("SIMULATED on pretend; kernels as calibrated on a core; load of experts: uniform", "busiest link: port in 3, 25.0 % of the time",
                  "1,235 rank-seconds per million output tokens", "memory of a rank: 512.0 MiB of 1.0 GiB"):
        assert words in text, words


def test_a_rebalancing_beside_what_came_of_it():
    assert "rebalancing" not in metrics(two_ranks(), PLACED)
    report = metrics(rebalanced(), REBALANCED)
    made, late = report["rebalancing"]
    line, = [line.split() for line in table.render(report).split("Rebalancing")[1].splitlines()[1:2]]
    assert line == ["layer", "0", "1", "1", "96", "B", "1.500", "->", "1.250", "1.333", "->", "1.600"]
    assert made == {"dp": 0, "stage": 0, "shard": 0, "layer": 0, "window_first_step": 0, "decided_step": 1, "switch_step": 1, "experts_moved": 1,
                    "moved_bytes": 96, "expected_gain_s": 0.5, "expected_cost_s": 0.25, "decision_to_switch_s": 2.5,
                    "heaviest_over_mean_before": pytest.approx(8 / 6), "heaviest_over_mean_before_predicted": 1.5,
                    "heaviest_over_mean_after_predicted": 1.25, "heaviest_over_mean_after": pytest.approx(4 / 2.5)}
    assert late["switch_step"] is late["decision_to_switch_s"] is late["heaviest_over_mean_after"] is None
    assert late["heaviest_over_mean_before"] == pytest.approx(4 / 2.5)


def predicted_report() -> dict:
    """A report with a prediction of it: twice as quick."""
    report = metrics(rebalanced(), REBALANCED)
    twice = copy.deepcopy(report)
    for section, names in (("throughput", ("elapsed_s",)), ("latency", ("ttft_mean_ms", "tpot_mean_ms"))):
        twice[section] |= {name: twice[section][name] / 2 for name in names if twice[section][name]}
    about = {"cluster": "pretend", "cluster_file": "c.toml", "calibration": "a core", "warnings": ["of another machine: X"], "reason": None}
    return report | {"predicted": about | predicted(report, twice)}


def test_a_prediction_stands_beside_what_was_measured():
    report = predicted_report()
    found = report["predicted"]
    assert found["over_measured"]["elapsed_s"] == 0.5 and found["over_measured"]["output_tokens_per_s"] == 1.0
    assert found["over_measured"]["phases"]["expert"] == {"mean_s": 1.0} and "send" not in found["phases"]
    text = " ".join(table.render(report).split())
    assert f"elapsed, s {table.number(found['elapsed_s'])} {table.number(report['elapsed_time'])} 0.5000" in text
    assert "on pretend; of another machine: X" in text
    none = table.render(report | {"predicted": {"cluster_file": "c.toml", "warnings": [], "reason": "c.toml: cannot be read"}})
    assert "c.toml: cannot be read" in none and "Predicted" not in table.render(metrics(two_ranks(), FACTS))


def test_docs_list_every_figure():
    report = predicted_report()
    assert not undocumented(report)
    assert undocumented(report | {"new_s": 1.0}) == {"new_s"}


def test_docs_list_nothing_else():
    """Names in the first column of the docs' tables are in a report."""
    names = {name for path, _ in leaves(predicted_report()) for name in path}
    for line in DOCS.read_text().splitlines():
        if line.startswith("| `"):
            for name in re.findall(r"`([a-z0-9_]+)`", line.split("|")[1]):
                assert name in names, f"docs/report.md lists {name}"
