"""`hpcmoe simulate`: sums made by hand, the order of a real run's ops, memory, bad input, the same bits each time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpcmoe.cluster.clusterfile import read_cluster
from hpcmoe.cluster.gemm import GemmModel, Tile
from hpcmoe.cluster.kernels import AttentionModel, Calibration, CallsModel, ElementwiseModel, HostModel
from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
from hpcmoe.errors import UserError
from hpcmoe.jobfile import read_job
from hpcmoe.report import metrics, table, trace
from hpcmoe.simulate.durations import Durations
from hpcmoe.simulate.facts import simulated_facts
from hpcmoe.simulate.loads import read_shares, whole_rows
from hpcmoe.simulate.modelfile import read_model
from hpcmoe.simulate.run import Told, simulate
from hpcmoe.simulate.workload import Rows

ROOT = Path(__file__).parent.parent
HUGE = 1e12
MODEL = ModelConfig("mixtral", 128, 64, 1, AttentionConfig(2, 2, 32), RouterConfig(4, 2), ExpertConfig(128), 64)
CLUSTER = """name = "by hand"
calibration = "demo_core"
[nodes]
count = 2
ranks_per_node = 4
[rank]
memory_gib = 1.0
tflop_per_s = 0.141
[inside]
latency_us = 3.0
rank_gb_per_s = 1.0
node_gb_per_s = 2.0
[nic]
per_node = 4
bandwidth_gb_per_s = 0.5
latency_us = 10.0
[mpi]
message_us = 2.0
"""


def by_hand(launch_us=0.0, sync_us=0.0, units=1, graph_us=None, op_us=0.0) -> Calibration:
    """Products at 1 GFLOP/s and attention's at 0.5, passes at 1 GB/s; everything else takes no time."""
    gemm = GemmModel(units, 4, 1.0 / units, HUGE, HUGE, HUGE, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, (1,), (Tile(1, 1, 1.0),))
    return Calibration("by hand", "made up", gemm, AttentionModel(0.5, 0.5, HUGE, 0.0, 1.0, 0.0, 0.0, 0.0), ElementwiseModel(1.0, 0.0),
                       HostModel(launch_us, sync_us, graph_us), calls=CallsModel(op_us=op_us))


@pytest.fixture
def cluster(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER)
    return path


def told(path, gpus, lengths, sets=(), model=MODEL, calibration=None, load="uniform") -> Told:
    job = read_job(None, ["weights.file=-", "task=throughput", *sets])
    shares, words = read_shares(load, model, job.run.batch_tokens)
    return Told(job, model, read_cluster(path, simulate=True), calibration or by_hand(), gpus, lengths, shares, words, [])


def report_of(done) -> dict:
    return metrics.metrics(done.records, simulated_facts(done, "cluster.toml"))


# ---------------------------------------------------------------- by hand
ATTEND = 512 + 2 * 192 * 64 + 1536 + 2 * 64 * 64 + 768     # ns of one row: norm, q k v, rotary, output product, residual; attention apart
GATE = 512 + 2 * 4 * 64 + 32                               # norm, router, choice
OTHER = 512 + 768 + 64 * (2 * 4 + 8)                       # embedding, send slots of two choices, merge
SAMPLE = 512 + 2 * 128 * 64 + 512 + 512
EXPERT = 2 * (2 * 256 * 64 + 2 * 64 * 128) + 2 * (256 + 128) * 4   # of two rows
COUNTS = 6 * 2000 + 3000 + 3 * 20 * 2                      # six messages, latency, 60 bytes from and to each rank: 240 over 2 GB/s: 120 ns
MOVE = 6 * 2000 + 3000 + 4 * 3 * 128 / 2                   # half a row (128 bytes) from each rank to each: 1,536 bytes over 2 GB/s


def scores(keys):
    return 2 * keys * 4 * 32 / 0.5


def test_one_layer_on_one_stage_is_the_sum_of_its_parts(cluster):
    """Four ranks with one expert each, one sequence on each of one prompt token and two output tokens, even load: two steps of four
    rows, after which a round finds that nothing is left. All by hand, in ns."""
    done = simulate(told(cluster, 4, [(1, 2)] * 4, ["run.schedule=plain"]))
    both = ATTEND + GATE + OTHER + SAMPLE + EXPERT + COUNTS + 2 * MOVE
    leader, = {tuple(r.steps) for r in done.records}
    assert [(s.prefill_rows, s.decode_rows) for s in leader] == [(1, 0), (0, 1)]
    assert [1e9 * (s.end_s - s.start_s) for s in leader] == pytest.approx([both + scores(1), both + scores(2)], rel=1e-9)
    empty = 1e9 * (done.records[0].run_s - leader[1].end_s)
    assert empty == pytest.approx(COUNTS, rel=1e-9)  # nothing moves, leaders only tell each other so
    found = report_of(done)["latency"]
    assert found["ttft_mean_ms"] == pytest.approx(1e-6 * (both + scores(1))) and found["tpot_mean_ms"] == pytest.approx(1e-6 * (both + scores(2)))


def test_two_replicas_of_a_node_share_its_memory(cluster):
    """Two replicas of two ranks, each as above but for two experts a rank: alone 2 ranks move 2 half-rows of 256 bytes; together the node's memory
    carries twice that, so that each of 4 exchanges takes as much longer as its bytes took."""
    sets = ["run.schedule=plain", "layout.ep=2"]
    alone = simulate(told(cluster, 2, [(1, 2)] * 2, sets))
    both = simulate(told(cluster, 4, [(1, 2)] * 4, [*sets, "layout.dp=2"]))
    assert len(both.groups) == 1 and len(both.records) == 4
    rows, counts = 256 * 1.0 * 2 / 2, (2 + 4) * 4 * 2 / 2  # ns over 2 GB/s: one row from each rank to the other; counts
    later = 1e9 * (both.records[0].run_s - alone.records[0].run_s)
    assert later == pytest.approx(2 * (2 * rows + counts) + counts, rel=1e-6)


@pytest.mark.parametrize("gpus, requests, sets", [
    (8, 16, ["layout.dp=4", "layout.ep=2"]), (8, 13, ["layout.dp=4", "layout.ep=2", "run.micro_batches=2", "run.lanes=2", "run.schedule=overlapped"]),
    (8, 9, ["layout.dp=2", "layout.pp=2", "layout.ep=2", "run.lanes=2"]), (8, 24, ["layout.dp=8"]), (6, 5, ["layout.dp=3", "layout.ep=2"]),
    (8, 16, ["layout.dp=2", "layout.ep=4", "run.transport=hierarchical"]), (8, 16, ["layout.dp=2", "layout.ep=2", "layout.tp=2"]),
    (16, 9, ["layout.dp=4", "layout.ep=2", "layout.tp=2"]), (16, 18, ["layout.dp=8", "layout.ep=2"])])
def test_nothing_is_lost_by_clocking_alike_replicas_once(cluster, monkeypatch, gpus, requests, sets):
    """Each replica clocked for itself, on the same links: all ranks' times are the same."""
    from hpcmoe.simulate import run
    small = _with(cluster, "ranks_per_node = 4", f"ranks_per_node = {gpus // 2}" if gpus > 8 else "ranks_per_node = 4", "node_gb_per_s = 2.0", "node_gb_per_s = 0.02", "bandwidth_gb_per_s = 0.5", "bandwidth_gb_per_s = 0.01",
                  "per_node = 4\nbandwidth", "per_node = 2\nbandwidth")  # nodes of 4 ranks, of 8 where there are 16; slow links
    asked = told(small, gpus, [(3, 3)] * requests, sets, LAYERS4)
    together = simulate(asked)
    monkeypatch.setattr(run, "alike", lambda layout, network, work_dp: [[dp] for dp in range(layout.dp)])
    apart = simulate(asked)
    assert len(together.groups) < len(apart.groups) or requests in (9, 5)
    for ours, theirs in zip(*(sorted(done.records, key=lambda r: r.rank) for done in (together, apart))):
        assert ours.rank == theirs.rank and ours.run_s == pytest.approx(theirs.run_s)
        for name in ("busy_s", "wait_s"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-12)
        assert [s.start_s for s in ours.steps] == pytest.approx([s.start_s for s in theirs.steps])


def test_the_host_pays_for_ops_and_graphs(cluster):
    """Every op costs its rank's host op_us, where nothing hides it: one step has RECV, seven ops of its layer and SAMPLE. A replayed graph costs
    graph_us instead of its launches: ATTEND, GATE and EXPERT of a step of single rows."""
    asked = told(cluster, 4, [(1, 2)] * 4, ["run.schedule=plain"])
    plain, paying = (simulate(asked._replace(calibration=by_hand(op_us=us))) for us in (0.0, 10.0))
    for ours, theirs in zip(paying.records[0].steps, plain.records[0].steps):
        assert 1e6 * ((ours.end_s - ours.start_s) - (theirs.end_s - theirs.start_s)) == pytest.approx(9 * 10, rel=1e-6)
    sets = ["run.schedule=plain", "run.device=gpu"]
    cheap, dear = (simulate(told(cluster, 4, [(1, 3)] * 4, sets, calibration=by_hand(1.0, 0.0, 2, us))) for us in (None, 101.0))
    later = {kind: 1e6 * (dear.records[0].busy_s[kind] - cheap.records[0].busy_s[kind]) for kind in ("ATTEND", "GATE", "EXPERT", "MERGE", "SAMPLE")}
    assert later == pytest.approx({"ATTEND": 300, "GATE": 300, "EXPERT": 300, "MERGE": 0, "SAMPLE": 0}, abs=1e-6)


def test_the_busiest_rank_is_waited_for(cluster):
    """Skewed: all ranks wait in COMBINE for the one with most rows, which does not wait for its like."""
    even = told(cluster, 4, [(1, 2)] * 8, ["run.schedule=plain"])
    done = simulate(even._replace(share_le=np.array([[0.5, 0.25, 0.125, 0.125]])))
    rows = [int(r.load[0].sum()) for r in done.records]
    assert rows == [8, 4, 2, 2]
    waits = [r.wait_s["COMBINE"] for r in done.records]
    assert waits[0] == min(waits) and waits[3] - waits[0] == pytest.approx(2 * 6 * (EXPERT / 2) * 1e-9, rel=1e-6)


def test_a_gpu_hides_launches_and_pays_for_syncs(cluster):
    """With two ranks' device work as on the CPU, launches in its shadow and 100 us of sync each time that the host looks at the device: before
    counts, combine and at the end (dispatch is posted when the counts have come: its rows have long been made)."""
    sets = ["run.schedule=plain", "run.device=gpu", "run.dispatch_dtype=auto"]
    slow, quick = (simulate(told(cluster, 4, [(1, 2)] * 4, sets, calibration=by_hand(0.001, us, 2))) for us in (100.0, 0.0))
    step_s = [s.end_s - s.start_s for s in slow.records[0].steps], [s.end_s - s.start_s for s in quick.records[0].steps]
    assert np.subtract(*step_s) == pytest.approx([3 * 100e-6] * 2, rel=1e-3)
    assert slow.records[0].device_s["EXPERT"] > 0 and slow.records[0].busy_s["EXPERT"] < 1e-6


def test_what_experts_and_leaders_take_by_hand():
    """Several experts on a rank: two products each, one pass for their activation, rows put in order before and after (two passes of rows of
    256 bytes, read and written). Not gated: one hidden half. FP8: rows of 80 bytes become fp32. A GPU's host launches them one by one, or as a graph."""
    def durations(model=MODEL, gpu=False, fp8=False, graphs=True):
        return Durations(by_hand(3.0, 0.0, 2) if gpu else by_hand(), model, model, gpu, graphs, fp8)

    def ns(took):
        return (pytest.approx(1e9 * took.host_s), pytest.approx(1e9 * took.device_s))
    row = 2 * 256 * 64 + 2 * 64 * 128 + (256 + 128) * 4
    assert ns(durations().expert((3,))) == (3 * row, 0) and ns(durations().expert((2, 0, 3))) == (5 * row + 2 * 5 * 512, 0)
    plain = replace(MODEL, expert=replace(MODEL.expert, gated=False))
    assert ns(durations(plain).expert((1,))) == (2 * 128 * 64 * 2 + 2 * 128 * 4, 0)
    assert durations(fp8=True).row_bytes == 80 and ns(durations(fp8=True).expert((3,))) == (3 * row + 3 * (80 + 256), 0)
    assert ns(durations(gpu=True).expert((3,))) == (3000, 3 * row) and ns(durations(gpu=True, graphs=False).expert((3,))) == (9000, 3 * row)
    assert durations(gpu=True).expert((0, 0)) == durations().expert(()) == (0.0, 0.0)
    chunk = Rows(np.array([4]), np.array([3]), 0.0, 0, 0, 3, 0)  # positions 4 to 6: 3 x 4 earlier keys and a square of 3 x 3
    single = Rows(np.zeros(0), np.zeros(0), 7.0, 2, 2, 0, 2)     # two decode rows with 3 and 4 keys
    assert ns(durations().attend(chunk)) == (3 * ATTEND + 2 * 21 * 128 / 0.5, 0)
    assert ns(durations().attend(single)) == (2 * ATTEND + scores(7), 0)
    assert durations(gpu=True).attend(chunk).host_s == pytest.approx(15e-6) and durations(gpu=True).attend(single).host_s == pytest.approx(3e-6)


# ---------------------------------------------------------------- as the engine does it
def test_order_and_rows_of_a_real_run(tmp_path):
    """One rank in this process, requests of unequal lengths in two micro-batches, with a trace: every span's op and round, waits among them,
    and each step's rows, in the order of the simulation."""
    from local import job_config, run_local, write_prompts
    from tiny import VOCAB, tiny_model
    from hpcmoe.config import OutputJob
    tiny_model(tmp_path / "m.h5")
    lengths = [(1 + 5 * i % 13, 1 + i % 4) for i in range(9)]
    write_prompts(tmp_path / "r.jsonl", [np.full(p, 3 + i) % VOCAB for i, (p, _) in enumerate(lengths)], max_tokens=[n for _, n in lengths], ignore_eos=True)
    limits = {"micro_batches": 2, "lanes": 2, "batch_tokens": 8, "prefill_chunk": 4, "max_sequences": 6}
    config = job_config(tmp_path / "m.h5", tmp_path / "r.jsonl", tmp_path / "out", **limits)
    _, session = run_local(replace(config, output=OutputJob(str(tmp_path / "out"), str(tmp_path / "t.json"), True)))
    real = session.records[0]
    here = told(ROOT / "inputs/clusters/demo_2_cores.toml", 1, lengths, [f"run.{name}={n}" for name, n in limits.items()] + ["output.trace=t"],
                session.model)
    ours, = simulate(here).records

    def order(record):
        return [(s.kind, s.layer, s.micro, s.step, s.wait) for s in record.spans]

    assert order(ours) == order(real) and len(real.spans) > 500
    assert [s[:2] + s[4:] for s in ours.steps] == [s[:2] + s[4:] for s in real.steps]
    assert ours.load.sum(axis=2).tolist() == real.load.sum(axis=2).tolist()
    assert {(q.index, q.prompt_tokens, q.output_tokens) for q in ours.requests} == {(q.index, q.prompt_tokens, q.output_tokens) for q in real.requests}
    assert (ours.weights_bytes, ours.kv_bytes) == (real.weights_predicted_bytes, real.kv_bytes)
    assert ours.expert_flop == real.expert_flop and ours.rows_own == real.rows_own


def test_rows_between_ranks_are_counted_as_sent(cluster):
    """Two nodes of two ranks: of each token's two rows a quarter stays, a quarter goes to the other rank of the node, half to the other node;
    and back. Over the run: 8 sequences, 2 steps."""
    done = simulate(told(cluster, 4, [(1, 2)] * 8, ["run.schedule=plain"])._replace(
        cluster=read_cluster(_with(cluster, "ranks_per_node = 4", "ranks_per_node = 2", "per_node = 4", "per_node = 2"), simulate=True)))
    t = report_of(done)["traffic"]
    for kind in ("dispatch", "combine"):
        assert [t[kind][name] for name in ("rows_own", "rows_within_nodes", "rows_between_nodes")] == [8, 8, 16]
        assert t[kind]["bytes_between_nodes"] == 16 * 256


def test_experts_are_where_a_placement_puts_them(cluster, tmp_path):
    """Shares of 1/2, 1/4, 1/8, 1/8 of 32 rows, experts in the order 3, 1, 0, 2: place 2 has the busiest; and what a placement's file promised
    of its rank stands beside what the simulation counted."""
    from hpcmoe.data.placement import Placement, Predicted, Seats, Shape, write_placement
    seats, predicted = Seats(1, 4, "all", (0, 0, 0, 0)), Predicted(0.0, 0.0, 0.0, 0.0, 1.0)
    write_placement(tmp_path / "p.json", Placement(Shape.of(MODEL), seats, np.array([[3, 1, 0, 2]]), (predicted,)))
    asked = told(cluster, 4, [(1, 2)] * 8, [f"layout.placement={tmp_path / 'p.json'}"])
    done = simulate(asked._replace(share_le=np.array([[0.5, 0.25, 0.125, 0.125]])))
    assert [int(r.load.sum()) for r in done.records] == [4, 8, 16, 4]
    report = report_of(done)
    assert report["expert_load"]["layers"][0]["rows_per_expert"] == [16, 8, 4, 4]
    placed, = report["placement"]["layers"]
    assert (placed["rows_busiest_rank"], placed["rows_busiest_rank_predicted"]) == (16, 16.0)


def _with(path, *changes):
    text = path.read_text()
    for old, new in zip(changes[::2], changes[1::2]):
        assert old in text
        text = text.replace(old, new)
    other = path.with_name("other.toml")
    other.write_text(text)
    return other


# ---------------------------------------------------------------- every layout, the same bits
LAYERS4 = ModelConfig("mixtral", 128, 64, 4, AttentionConfig(2, 2, 32), RouterConfig(4, 2), ExpertConfig(128), 64)


@pytest.mark.parametrize("sets", [["layout.pp=2", "layout.ep=4"], ["layout.pp=4", "layout.ep=1", "layout.tp=2"], ["layout.ep=2", "layout.tp=2", "layout.dp=2"],
                                  ["layout.pp=2", "layout.ep=4", "layout.leaders=node"], ["layout.ep=8"], ["layout.dp=8"],
                                  ["layout.pp=2", "layout.ep=2", "layout.tp=2", "layout.leaders=1", "run.device=gpu", "run.lanes=2"]])
def test_all_layouts_do_all_the_work(cluster, sets):
    """Whatever the layout: every request is answered, every layer's rows are k times the tokens, and times add up on every rank."""
    lengths = [(1 + i % 5, 2 + i % 3) for i in range(13)]
    calibration = by_hand(0.001, 0.01, 2) if "run.device=gpu" in sets else None
    first, again = (simulate(told(cluster, 8, lengths, [*sets, "output.trace=t"], LAYERS4, calibration, "power-law:1")) for _ in range(2))
    report = report_of(first)
    assert report["requests"]["finished"] == 13 and report["throughput"]["output_tokens"] == sum(n for _, n in lengths)
    tokens = sum(p + n - 1 for p, n in lengths)
    assert [layer["rows"] for layer in report["expert_load"]["layers"]] == [2 * tokens] * 4
    copies = 2 if sets == ["layout.ep=8"] else 1  # more places than experts
    assert all(layer["copies_per_expert"] == [copies] * 4 for layer in report["expert_load"]["layers"])
    for r in first.records:
        assert sum(r.busy_s.values()) + sum(r.wait_s.values()) == pytest.approx(r.run_s)
        assert sum(s.end_s - s.start_s for s in r.spans if not s.device) == pytest.approx(r.run_s)
    assert len({r.rank for r in first.records}) == 8 and report["throughput"]["prefill_rows"] + report["throughput"]["decode_rows"] == tokens
    assert repr(first.records) == repr(again.records) and report == report_of(again)


def test_a_small_cluster_in_full(cluster, tmp_path):
    """The table of a small simulation, to the letter."""
    done = simulate(told(cluster, 8, [(4, 3)] * 16, ["layout.pp=2", "layout.ep=4"], LAYERS4))
    lines = [line for line in table.render(report_of(done)).splitlines() if not line.startswith("versions")]
    assert "\n".join(lines) + "\n" == (Path(__file__).parent / "golden" / "simulate.txt").read_text()


def test_a_trace_can_be_read_back(cluster, tmp_path):
    done = simulate(told(cluster, 4, [(1, 2)] * 4, ["output.trace=t"]))
    ranks = trace.read_trace(trace.write_trace(tmp_path / "t.json", done.records))
    assert [len(spans) for _, spans in ranks] == [len(r.spans) for r in done.records] and len(ranks) == 4


# ---------------------------------------------------------------- what is asked for
def test_whole_rows_are_dealt_by_largest_remainder():
    assert whole_rows(10, np.array([0.5, 0.26, 0.24])).tolist() == [5, 3, 2]
    assert whole_rows(2, np.full(4, 0.25)).tolist() == [1, 1, 0, 0] and whole_rows(0, np.full(4, 0.25)).tolist() == [0] * 4
    assert whole_rows(7, np.array([1 / 3] * 3)).sum() == 7


def command(*words):
    from hpcmoe.cli import main
    return main(["simulate", *map(str, words)])


@pytest.mark.parametrize("words, expected", [
    (["--gpus", "9"], "--gpus = 9: expected 1 to 8"),
    (["--gpus", "8", "--set", "layout.ep=3"], "ep=3 does not fit 8 ranks"),
    (["--set", "layout.pq=3"], "layout.pq = 3: expected one of the keys"),
    (["--load", "zipf"], "--load = 'zipf': expected uniform, power-law"),
    (["--load", "power-law:x"], "--load = 'power-law:x'"),
    (["--load", "power-law:-1"], "--load = 'power-law:-1'"),
    (["--load", "no.h5"], "no.h5: no such file"),
    (["--prompt-tokens", "64"], "= 96: expected at most 64, the model's context"),
    (["--set", "run.transport=staged"], "run.transport = 'staged': expected another one"),
    (["--set", "run.capacity_factor=2"], "run.capacity_factor = 2.0: expected 0"),
    (["--set", "task=score"], "--set = 'task=score': expected a key that is not said otherwise"),
    (["--requests", "r.jsonl"], "--requests = 'r.jsonl': expected either this or --sequences"),
    (["--sequences", "0"], "throughput.sequences = 0: expected a number >= 1"),
    (["--set", "layout.tp=3"], "layout: tp = 3: expected a divisor"),
    (["--set", "weights.dtype=bf16"], "weights.dtype = 'bf16': expected a type of 4 bytes"),
])
def test_bad_input_is_one_clear_error(cluster, tmp_path, capsys, words, expected):
    command_line = [model_file(tmp_path), "--cluster", cluster, "--prompt-tokens", "4", *words]
    assert command(*command_line) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and expected in err[0], err


def model_file(folder, text='family = "mixtral"\nvocab = 128\nd = 64\nlayers = 4\ncontext = 64\n[attention]\nheads = 2\nkv_heads = 2\n'
               'head_dim = 32\n[router]\nexperts = 4\ntop_k = 2\n[expert]\nf = 128\n'):
    path = folder / "model.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name, text, expected", [
    ("m.toml", "vocab = 3\nwidth = 8\n", "m.toml: width = 8: expected one of the keys family, vocab"),
    ("m.toml", "vocab = \n", "m.toml: not TOML"), ("m.json", "{", "m.json: not JSON"), ("m.json", "[]", "m.json: document = 'list'"),
    ("m.json", '{"model_type": "gpt2"}', "m.json: model_type = 'gpt2': expected a supported family"),
    ("m.txt", "", "MODEL = '/"), ("none.toml", None, "none.toml: cannot be read"), ("none.h5", None, "none.h5"),
])
def test_a_models_file_is_checked(tmp_path, name, text, expected):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_model(str(tmp_path / name))
    assert expected in str(error.value)


def test_a_model_by_its_hugging_face_configuration(tmp_path):
    import json
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "mixtral", "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_local_experts": 4, "intermediate_size": 128, "num_experts_per_tok": 2, "max_position_embeddings": 64}))
    ours, theirs = read_model(str(model_file(tmp_path))), read_model(str(tmp_path / "config.json"))
    assert replace(theirs, attention=replace(theirs.attention, rope=ours.attention.rope)) == ours


def test_a_report_is_written_and_set_beside_another(cluster, tmp_path, capsys):
    """From the command line, without MPI; both reports are such as `hpcmoe report` reads."""
    from hpcmoe.report import compare
    from hpcmoe.report.reading import read_report
    words = [model_file(tmp_path), "--cluster", cluster, "--prompt-tokens", "4", "--output-tokens", "3", "--sequences", "16"]
    assert command(*words, "--output", tmp_path / "a", "--trace", tmp_path / "t.json") == 0
    assert command(*words, "--set", "layout.pp=2", "--output", tmp_path / "b") == 0
    reports = [read_report(tmp_path / name) for name in "ab"]
    assert "simulated on" in compare.render(reports) and len(trace.read_trace(tmp_path / "t.json")) == 8
    facts = reports[0]["run"]["simulated"]
    assert facts["gpu_s_per_million_output_tokens"] == pytest.approx(8 * reports[0]["elapsed_time"] / 48 * 1e6)
    assert facts["cluster"] == "by hand" and facts["load"] == "uniform" and facts["warnings"] == []


def test_no_mpi_is_started(tmp_path):
    import subprocess
    import sys
    code = "import sys, hpcmoe.simulate.run; sys.exit('mpi4py.MPI' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_another_models_load_is_refused(cluster, tmp_path):
    from hpcmoe.data.loadfile import NAME, write_load
    from hpcmoe.report.record import RankRecord
    record = RankRecord(0, "h", 0, 0, 0, 0, True, [0], [0, 1, 2, 3], load=np.ones((3, 1, 4), int))
    write_load(tmp_path, [record], MODEL, 1)
    assert read_shares(str(tmp_path / NAME), MODEL, 1)[0].tolist() == [[0.25] * 4]
    with pytest.raises(UserError, match="rows of 1 layers x 4 experts: expected 4 x 4"):
        read_shares(str(tmp_path / NAME), LAYERS4, 1)


def test_the_load_of_a_runs_routing(tmp_path):
    """Three tokens chose experts 0 and 1, one 2 and 3."""
    from hpcmoe.data.routing import write_routing
    pairs = np.zeros((1, 4, 4), dtype=np.int64)
    pairs[0, :2, :2], pairs[0, 2:, 2:] = 3, 1
    shares, words = read_shares(str(write_routing(tmp_path, MODEL, pairs)), MODEL, 1)
    assert shares.tolist() == [[3 / 8, 3 / 8, 1 / 8, 1 / 8]] and words.endswith("routing.h5")
    with pytest.raises(UserError, match="another model's"):
        read_shares(words, LAYERS4, 1)


def test_a_power_law_is_the_same_each_time():
    first, again, other = (read_shares(f"power-law:1.2:{seed}", LAYERS4, 500)[0] for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).any() and first.sum(axis=1) == pytest.approx([1] * 4)
    assert first.max() > 0.3 > 0.25 > first.min()


def test_a_calibration_of_another_machine_is_named(cluster, tmp_path, capsys):
    assert command(model_file(tmp_path), "--cluster", cluster, "--prompt-tokens", "4", "--sequences", "4",
                   "--calibration", ROOT / "inputs/calibrations/h100_sxm.toml") == 0
    err = capsys.readouterr().err
    assert "is of 'NVIDIA H100 SXM 80 GB'" in err and "names a calibration of \"one core of the demo's machine" in err


def test_a_model_that_does_not_fit_is_refused_with_one_that_would(cluster, tmp_path):
    """Experts of 128 MiB each (fp32), a rank has 1 GiB. Of 16 layers of 4 each of 8 ranks would have 8 experts and dense weights besides, however
    they are dealt. Of 8 layers two replicas are as bad; two stages instead leave room."""
    big = ModelConfig("mixtral", 128, 1024, 16, AttentionConfig(2, 2, 32), RouterConfig(4, 2), ExpertConfig(10923), 64)
    with pytest.raises(UserError, match=r"weights of .* more than the 1.0 GiB .*; no layout fits up to 8 ranks"):
        simulate(told(cluster, 8, [(1, 2)] * 4, [], big))
    half = replace(big, layers=8)
    with pytest.raises(UserError, match=r"dp=2 pp=1 ep=4 tp=1: stage 0 leader: .* the nearest that fits: dp=1 pp=2 ep=4 tp=1"):
        simulate(told(cluster, 8, [(1, 2)] * 4, ["layout.dp=2", "layout.ep=4"], half))
