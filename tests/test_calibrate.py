"""Is the simulator right: shared cores, numbers of rows that are new, ops of a CPU, predictions in reports, and exchanges on shaped links."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpcmoe.cluster.clusterfile import read_cluster
from hpcmoe.cluster.fair import Start, ends
from hpcmoe.cluster.kernels import CallsModel, read_calibration
from hpcmoe.compute.base import Sizes
from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
from hpcmoe.errors import UserError
from hpcmoe.parallel.polling import pause_s, woken_s
from hpcmoe.simulate.cores import Cores, Machine
from hpcmoe.simulate.durations import Durations
from hpcmoe.simulate.plans import Unseen, first_seen
from hpcmoe.simulate.run import simulate
from hpcmoe.simulate.workload import Rows, handed_out, rows_of
from local import run_job
from mpi import ROOT, run_ranks
from test_simulate import CLUSTER, by_hand, told
from tiny import tiny_job

BED = ROOT.parent / "shared" / "testbed" / "netns" / "cluster.sh"
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))


# ---------------------------------------------------------------- shared cores
@pytest.mark.parametrize("seed", range(5))
def test_shared_cores_are_max_min_fair(seed):
    """Jobs that start at random times on two cores, against flows on a link of each rank and one of the node."""
    rng = np.random.default_rng(seed)
    jobs = sorted((float(t), float(s)) for t, s in zip(rng.random(7) * 3, rng.random(7) + 0.1))
    cores, done, waiting = Cores([Machine(7, 2, 1.8)]), {}, list(enumerate(jobs))
    while waiting or cores.next_end():
        due = cores.next_end()
        if due and (not waiting or due[0] <= waiting[0][1][0]):
            done[cores.end(*due)] = due[0]
        else:
            number, (at, seconds) = waiting.pop(0)
            cores.start(at, 0, seconds, number)
    loads = [np.concatenate([np.eye(7)[i] * s, [s]]) for i, (_, s) in enumerate(jobs)]
    expected = ends([Start(at, load) for (at, _), load in zip(jobs, loads)], np.array([1.0] * 7 + [1.8]))
    assert [done[i] for i in range(7)] == pytest.approx(expected.tolist())


def test_who_waits_takes_a_part_of_a_core_where_ranks_are_more_than_cores():
    """Pauses of 260 us, which cost 40 us of a core each."""
    assert Machine(4, 2, 2.0, 0.0, 40e-6).share(2) == pytest.approx(2.0 / (2 + 2 * 40 / 300)) and Machine(4, 2, 2.0, 0.0, 40e-6).share(4) == 0.5
    assert Machine(2, 2, 2.0, 0.0, 40e-6).share(1) == 1.0 and Machine(2, 2, 1.8, 0.0, 40e-6).share(2) == 0.9
    cores = Cores([Machine(3, 1, 1.0)])
    cores.start(0.0, 0, 1.0, first := object())
    cores.start(0.0, 0, 5.0, second := object())
    cores.drop(1.0, 0, second)  # the first has had half a second, and the core to itself from now on
    assert cores.next_end() == (1.5, 0) and cores.end(1.5, 0) is first and cores.next_end() is None


def test_a_waiting_rank_looks_as_the_engine_does():
    assert pause_s(0.001) == 0.0002 and pause_s(0.1) == 0.001 and pause_s(10) == 0.005
    woken = woken_s(1.0, 1.01)
    assert 1.01 <= woken < 1.01 + 0.00027 and woken_s(2.0, 2.0) == 2.0


def test_ranks_on_one_core_take_turns(tmp_path):
    """Four ranks without messages' times on one core: each op takes four times as long as on a core of its own, and reports hold all four."""
    text = CLUSTER.replace("message_us = 2.0", "message_us = 0.0").replace("latency_us = 3.0", "latency_us = 0.0")
    text = text.replace("rank_gb_per_s = 1.0", "rank_gb_per_s = 1e9").replace("node_gb_per_s = 2.0", "node_gb_per_s = 1e9")
    (tmp_path / "own.toml").write_text(text)
    (tmp_path / "one.toml").write_text(text + "[cores]\nper_node = 1\ntogether = 1.0\n")
    (tmp_path / "four.toml").write_text(text + "[cores]\nper_node = 4\ntogether = 4.0\n")
    sets = ["run.schedule=plain", "output.trace=t"]
    own, one, four = (simulate(told(tmp_path / f"{name}.toml", 4, [(2, 3)] * 4, sets)) for name in ("own", "one", "four"))
    for mine, same, shared in zip(*(done.records for done in (own, four, one))):
        assert same.run_s == pytest.approx(mine.run_s) and same.busy_s == pytest.approx(mine.busy_s) and len(same.spans) == len(mine.spans)
        assert [s[:4] for s in shared.spans] == [s[:4] for s in mine.spans]
        for kind in ("ATTEND", "EXPERT"):
            assert shared.busy_s[kind] == pytest.approx(4 * mine.busy_s[kind])
    assert [r.rank for r in one.records] == [0, 1, 2, 3] and one.records[0].bytes_intra == own.records[0].bytes_intra


def test_bad_cores_are_named(tmp_path):
    for words, line in (("cores.together = 3.0: expected at most cores.per_node = 2", "per_node = 2\ntogether = 3.0"),
                        ("cores.look_us = -1.0", "per_node = 2\ntogether = 2.0\nlook_us = -1.0"),
                        ("cores.per_node = 0", "per_node = 0\ntogether = 2.0")):
        (tmp_path / "c.toml").write_text(CLUSTER + f"[cores]\n{line}\n")
        with pytest.raises(UserError, match=words):
            read_cluster(tmp_path / "c.toml")


# ---------------------------------------------------------------- numbers of rows
def test_new_numbers_of_rows_against_draws():
    """Experts' rows drawn for each of 8 steps, and counted: rows of a last slab of at most 16 that had not been there."""
    rng, chance_e, tokens = np.random.default_rng(0), np.array([0.3, 0.3, 0.05, 0.9]), [12, 12, 40, 12, 3, 40, 40, 12]
    unseen, counted, draws = Unseen(16), np.zeros(len(tokens)), 3000
    expected = [unseen.new(n, chance_e) for n in tokens]
    for _ in range(draws):
        seen = set()
        for i, n in enumerate(tokens):
            now = {int(m - 1) % 16 + 1 for m in rng.binomial(n, chance_e) if m}
            counted[i] += len(now - seen)
            seen |= now
    np.testing.assert_allclose(expected, counted / draws, rtol=0.05, atol=0.03)
    assert first_seen([0, 3, 5, 3, 19, 21, 16, 0, 32], 16) == [False, True, True, False, False, False, True, False, False]
    assert first_seen([3, 19, 3], 0) == [True, True, False]


def test_how_many_experts_have_rows():
    """Two tokens that choose one of four experts each: 4 (1 - (3/4)^2) of them on average, with 2 rows altogether: by_hand's products are linear."""
    model = ModelConfig("mixtral", 128, 64, 1, AttentionConfig(2, 2, 32), RouterConfig(4, 1), ExpertConfig(128), 64)
    calls = replace(by_hand(), calls=CallsModel(expert_one_us=1.0))
    plain, more = (Durations(c, model, model, False, False, False).expert((0.5,) * 4, 2).host_s for c in (by_hand(), calls))
    assert more - plain == pytest.approx(4e-6 * (1 - 0.75**2))
    assert plain == pytest.approx(Durations(by_hand(), model, model, False, False, False).expert((1, 1)).host_s)


def test_padded_and_copied_keys_as_attention_has_them():
    """Blocks of 64 decode rows in the order of slots, each as long as its longest; one of them with a gap between its slots."""
    from hpcmoe.compute.step import SAMPLED, Batch
    from hpcmoe.model.attention import Segments
    slot_q = np.array([*range(64, 0, -1), *range(70, 76)])
    start_q = np.arange(70) % 9
    segments = Segments.of(slot_q, start_q, np.ones(70, int))
    batch = Batch(True, 0, segments, np.full(70, SAMPLED), np.arange(70), np.zeros(70, int), np.zeros(0, int))
    blocks = np.array_split(np.argsort(slot_q), 2)
    rows = rows_of(batch, 0)
    assert rows.keys == start_q.sum() + 70
    assert rows.padded == sum(len(b) * (start_q[b].max() + 1) for b in blocks)
    assert rows.apart == len(blocks[1]) * (start_q[blocks[1]].max() + 1)  # slots 36 to 64, then 70 to 75


def test_what_ops_take_is_found_again():
    """A made-up machine whose ops take what a calibration says: the fit gives it back."""
    from hpcmoe.calibrate import ops
    truth = CallsModel(5.0, 0.1, 40.0, 2.0, 90.0, 0.5, 3.0, 0.2, 30.0, 20.0, 0.5, 15.0, 0.3, 100.0, 2.0, 200.0, 100.0, 50.0, 4.0)
    real = replace(read_calibration(ROOT / "inputs/calibrations/demo_core.toml"), calls=truth)
    model, none = ops.MODELS[0], np.zeros(0, int)
    rows = [Rows(none, none, 40.0 * n, n, n, 0, n, 40.0 * n) for n in (1, 4, 16, 64)] + [Rows(np.zeros(4, int), np.full(4, 16), 0.0, 0, 4, 64, 0)]
    timed = [ops.Timed(model, kind, r, (r.count,) * used, 0.0) for kind in ops.KINDS for r in rows for used in (2, 16)]
    seconds = ops.op_seconds(real, timed)
    found = ops.fit_calls(replace(real, calls=CallsModel()), [one._replace(seconds=float(s)) for one, s in zip(timed, seconds)])
    np.testing.assert_allclose(ops.op_seconds(replace(real, calls=found), timed), seconds, rtol=0.02)


def test_replicas_take_requests_from_one_list():
    """Two replicas of one leader and one of two: every request runs once to its end, at the start half of the tokens at most are dealt, and
    the last replica ends at most a few rounds after the first."""
    lengths = [(3 + i % 7, 1 + 5 * i % 11) for i in range(60)]
    feed_dj, index_dj = handed_out(lengths, [1, 1, 2], Sizes(2, 1, 6, 32, 32, 0, 0, 64), 8, 0)
    assert [len(feeds) for feeds in feed_dj] == [1, 1, 2] and sorted(i for index_j in index_dj for index in index_j for i in index) == list(range(60))
    for feed, index in zip(sum(feed_dj, []), sum(index_dj, [])):
        assert sorted((lengths[index[s.place]]) for s in feed.served) == sorted(lengths[i] for i in index)
        assert sum(rows.count for rows_m in feed.rows_rm for rows in rows_m) == sum(prompt + outputs - 1 for prompt, outputs in (lengths[i] for i in index))
    rounds = [max(i for feed in feeds for i, rows_m in enumerate(feed.rows_rm) if any(rows.count for rows in rows_m)) for feeds in feed_dj]
    assert max(rounds) - min(rounds) <= 6
    alone, _ = handed_out(lengths, [2], Sizes(2, 1, 6, 32, 32, 0, 0, 64), 8, 0)
    assert len(alone[0]) == 2


# ---------------------------------------------------------------- predictions in reports
@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A cluster file with a calibration of this processor: demo_core's numbers."""
    from hpcmoe.doctor import processor
    folder = tmp_path_factory.mktemp("machine")
    core = (ROOT / "inputs/calibrations/demo_core.toml").read_text()
    (folder / "core.toml").write_text(f"processor = {json.dumps(processor())}\n{core}")
    (folder / "other.toml").write_text(f'processor = "a processor of another world"\n{core}')
    for name in ("core", "other"):
        (folder / f"{name}-cluster.toml").write_text(
            CLUSTER.replace('"demo_core"', f'"{name}.toml"').replace("memory_gib = 1.0", "memory_gib = 4.0") + "[cores]\nper_node = 2\ntogether = 2.0\n")
    return folder


@pytest.mark.mpi
@pytest.mark.parametrize("ranks, sets", [(1, {}), (4, {"layout.pp": 2, "layout.ep": 2, "run.micro_batches": 2})])
def test_a_report_has_what_was_predicted(machine, tmp_path, ranks, sets):
    """Real requests, their real lengths; figures of the order of those measured; a warning where the calibration is another processor's."""
    job = tiny_job(tmp_path / "job")
    sets = {"weights.file": job.parent / "model.h5", "requests.file": job.parent / "requests.jsonl", **sets}
    _, _, report = run_job(ranks, tmp_path, {**sets, "run.cluster": machine / "core-cluster.toml"})
    found = report["predicted"]
    assert found["reason"] is None and found["warnings"] == [] and found["cluster"] == "by hand"
    assert set(found["over_measured"]) == {"elapsed_s", "output_tokens_per_s", "total_tokens_per_s", "ttft_mean_ms", "tpot_mean_ms", "phases"}
    assert found["elapsed_s"] == pytest.approx(report["elapsed_time"] * found["over_measured"]["elapsed_s"])
    assert found["output_tokens_per_s"] * found["elapsed_s"] == pytest.approx(report["throughput"]["output_tokens"])
    assert 0 < found["elapsed_s"] < 5
    _, _, other = run_job(ranks, tmp_path, sets, env={"HPCMOE_CLUSTER": str(machine / "other-cluster.toml")}, name="other")
    assert "is of another machine: a processor of another world" in other["predicted"]["warnings"][0]
    assert "predicted" not in run_job(ranks, tmp_path, sets, name="none")[2] if ranks == 1 else True


@pytest.mark.mpi
def test_a_prediction_that_fails_costs_the_run_nothing(machine, tmp_path):
    """A file named by the environment that is not there, and a run that is not modelled: the report says so. A job's own key is checked first."""
    job = tiny_job(tmp_path / "job", requests=2)
    sets = {"weights.file": job.parent / "model.h5", "requests.file": job.parent / "requests.jsonl"}
    _, rows, report = run_job(1, tmp_path, sets, env={"HPCMOE_CLUSTER": str(tmp_path / "none.toml")})
    assert len(rows) == 2 and "none.toml" in report["predicted"]["reason"]
    _, _, report = run_job(1, tmp_path, {**sets, "task": "score", "run.cluster": machine / "core-cluster.toml"}, name="score")
    assert "not modelled" in report["predicted"]["reason"]
    done, _, _ = run_job(1, tmp_path, {**sets, "run.cluster": tmp_path / "none.toml"}, name="bad", check=False)
    assert done.rc == 2 and done.err.count("none.toml") == 1 and not (tmp_path / "bad-1" / "outputs.jsonl").exists()


# ---------------------------------------------------------------- calibrate compare, calibrate links
def test_comparison_files():
    from hpcmoe.calibrate.compare import Compared, Setting, means, read_comparison, render
    shipped = read_comparison(str(ROOT / "inputs/comparisons/demo.toml"))
    small = [s for s in shipped.setting if s.ranks <= 2]
    assert len(small) >= 12 and sum(not s.seen for s in small) >= 12 and {s.ranks for s in shipped.setting} == {1, 2, 4, 8, 16}
    found = [Compared(Setting("a", 1, seen=True), 1, (110.0, 100.0)), Compared(Setting("b", 2), 1, (80.0, 100.0)), Compared(Setting("c", 4), 1, (150.0, 100.0)),
             Compared(Setting("d", 2), 1, reason="not predicted")]
    assert {title: round(value, 6) for title, (value, _) in means(found, 2).items()} == {
        "all with at most 2 ranks": 0.15, "of these seen": 0.1, "of these held out": 0.2, "with more than 2 ranks": 0.5}
    assert "held out: mean absolute error of TPS 20.0 %" in render(found, 2) and "not predicted" in render(found, 2)


@pytest.mark.parametrize("text, words", [
    ('job = "j"\nsetting = []', "setting is missing"), ('job = "j"\n[[setting]]\nname = "a"\nranks = 0', r"setting\[0\].ranks = 0"),
    ('[[setting]]\nname = "a"\nranks = 1', "job is missing"), ('job = "j"\n[[setting]]\nname = "a"\nranks = 1\nsets = ["x"]', "key=value"),
    ('job = "j"\n[[setting]]\nname = "a"\nranks = 1\nsets = [1]', "a list of texts"), ('job = "j"\n[[setting]]\nname = "a"\nrank = 1', r"setting\[0\].rank")])
def test_bad_comparison_files_are_named(tmp_path, text, words):
    from hpcmoe.calibrate.compare import read_comparison
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_comparison(str(tmp_path / "c.toml"))


@pytest.mark.mpi
def test_links_of_this_machine(tmp_path):
    """Two ranks: the file that is written can be simulated on, and its numbers are of the order that any machine has. One rank alone: an error."""
    out = tmp_path / "here.toml"
    command = ["-m", "hpcmoe", "calibrate", "links", "--calibration", str(ROOT / "inputs/calibrations/demo_core.toml"), "--output", str(out)]
    done = run_ranks(1, command)
    assert done.rc == 2 and "one rank only" in done.err and not out.exists()
    run_ranks(2, command, timeout=120).check()
    c = read_cluster(out, simulate=True)
    assert c.cores.per_node == len(os.sched_getaffinity(0)) and 0.3 < c.cores.together <= c.cores.per_node and 0 < c.cores.look_us < 1e5 and 0 < c.cores.pause_us < 1e5
    assert 0.001 < c.inside.rank_gb_per_s < 1000 and c.mpi.message_us < 1e4 and c.ranks == 16
    done = simulate(told(out, 2, [(2, 2)] * 4))
    assert done.records[0].run_s > 0


# ---------------------------------------------------------------- exchanges on links
def measured(case_file: Path) -> dict:
    return json.loads(case_file.read_text())


@pytest.mark.mpi
def test_bytes_between_nodes_are_those_that_the_engine_counts(tmp_path):
    """Four ranks that pretend two nodes: rows, counts, heads of parcels, flat and hierarchical, to the byte."""
    import links
    out, cluster = tmp_path / "m.json", tmp_path / "links.toml"
    run_ranks(4, ["-m", "mpi4py", str(ROOT / "tests/benchmarks/links.py"), "--measure", str(out), "--rows", "3,8", "--top-k", "2,4", "--d", "16", "--repeats", "1"],
              env={"HPCMOE_RANKS_PER_NODE": "2", "PYTHONPATH": str(ROOT)}).check()
    cluster.write_text(CLUSTER.replace("ranks_per_node = 4", "ranks_per_node = 2").replace("per_node = 4\nband", "per_node = 2\nband"))
    found = links.predict({"shaped": cluster}, measured(out), 16)
    assert len(found) == 12 and all(f["bytes_between"] == f["bytes_between_predicted"] > 0 and f["shaped"] > 0 for f in found)


@pytest.mark.mpi
def test_exchanges_on_shaped_links(tmp_path):
    """Two hosts with slow links: predictions are right to within a factor that a busy machine leaves (docs/simulate.md has figures)."""
    import links
    if not BED.exists():
        pytest.skip(f"no test bed of several hosts: {BED}")
    if os.getuid():
        pytest.skip("the test bed of several hosts wants root")
    args = type("Args", (), dict(hosts=[2], ranks=2, rate_mbit=50.0, delay_ms=1.0, rows=[32], top_k=[8], experts=16, d=512, repeats=3))
    try:
        found = links.compare(links.Bed(str(BED)), args)
    except RuntimeError as error:
        pytest.skip(f"the test bed of several hosts does not start: {error}")
    for f in found:
        assert f["bytes_between"] == f["bytes_between_predicted"] and 0.8 < f["measured_ms"] / f["shaped"] < 4, f
