"""`hpcmoe plan`: short cuts against the simulator in full, pruning against trying everything, what it writes, bad input."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.compute.base import Sizes
from hpcmoe.errors import UserError
from hpcmoe.parallel.layout import Layout
from hpcmoe.plan.bound import bounds
from hpcmoe.plan.candidates import Candidate, Choices, Shape, job_of
from hpcmoe.plan.frame import Frames
from hpcmoe.plan.room import Room
from hpcmoe.plan.rounds import rounds_of
from hpcmoe.plan.search import front, runner_up, search, within
from hpcmoe.plan.stand import Stand
from hpcmoe.plan.trial import TERMS, run_trial
from hpcmoe.simulate import run as simulate_run
from hpcmoe.simulate.workload import feed
from test_simulate import CLUSTER, LAYERS4, by_hand, model_file, report_of, told

ROOT = Path(__file__).parent.parent
NEAR = 0.03  # of a trial that leaves rounds out: docs/plan.md says so


@pytest.fixture
def cluster(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER)
    return path


def asked(cluster, gpus=8, requests=32, prompt=8, outputs=6, sets=(), gpu=False, load="uniform", model=LAYERS4):
    """A question about a small model; a GPU's launches and syncs are as slow as its products."""
    calibration = by_hand(0.5, 2.0, 2) if gpu else by_hand()
    return told(cluster, gpus, [(prompt, outputs)] * requests, [*sets, "run.device=gpu"] if gpu else list(sets), model, calibration, load)


def everything(t, fixed=frozenset()):
    """All candidates that fit, found without the search."""
    choices, room = Choices(t, set(fixed)), Room(t)
    return [c for layout in choices.layouts for shape in choices.shapes(layout) for cut in choices.cuts(layout)
            if choices.takes_batch(c := Candidate(shape, *cut)) and room.needs(c).over <= 0]


# ---------------------------------------------------------------- rounds
@settings(deadline=None, max_examples=80)
@given(st.integers(1, 9), st.integers(0, 20), st.integers(1, 7), st.integers(1, 12), st.integers(1, 9), st.sampled_from([0, 5]), st.integers(1, 3))
def test_rounds_are_those_of_the_engines_batching(requests, more, chunk, prompt, outputs, window, micros):
    """Every row of every step, and when each request has its first token and its last."""
    rows = requests + more
    lengths = [(prompt, outputs)] * (requests * micros)
    real = feed(lengths, Sizes(micros, 1, requests, rows, prompt + outputs, 0, 0, 0), chunk, window)
    ours = rounds_of(requests, rows, chunk, prompt, outputs, window, 1 + (micros > 1), whole=True)
    assert [repr(r) for r in ours.rows_r] == [repr(rows_m[0]) for rows_m in real.rows_rm]
    assert ours.weight_r == [1.0] * len(ours.rows_r)
    for m in range(micros):  # the m-th micro-batch takes the m-th so many requests
        served = sorted((s for s in real.served if s.place // requests == m), key=lambda s: s.place)
        assert [(f * micros + m, e * micros + m) for f, e in zip(ours.first_q, ours.end_q)] == [(s.first, s.end) for s in served]


@pytest.mark.parametrize("size", [(64, 64, 256, 128, 32), (4, 256, 256, 128, 500), (300, 310, 64, 50, 20), (1, 1, 8, 100, 1), (16, 4096, 256, 1, 1)])
def test_rounds_that_are_kept_stand_for_all(size):
    whole, short = (rounds_of(*size, 0, whole=w) for w in (True, False))
    assert sum(short.weight_r) == len(whole.rows_r) and sum(n for _, n in short.point_r) == len(whole.rows_r) - 1
    assert (short.first_q == whole.first_q).all() and (short.end_q == whole.end_q).all() and len(short.rows_r) <= 24
    kept = [repr(r) for r in short.rows_r]
    at = iter(repr(r) for r in whole.rows_r)
    assert all(r in at for r in kept)  # rounds of the whole, in their order


# ---------------------------------------------------------------- trials
def shape(layout, sequences, rows, hierarchical=False, leaders=None):
    return Shape(layout, leaders or layout.ep, hierarchical, sequences, rows)


CASES = [Candidate(shape(Layout(2, 2, 2), 4, 16), 4, 2), Candidate(shape(Layout(1, 1, 8, replicas=4), 3, 5), 2, 1),
         Candidate(shape(Layout(1, 4, 1, 2), 8, 8), 4, 2), Candidate(shape(Layout(1, 2, 4, leaders="1"), 5, 32, leaders=1), 3, 2),
         Candidate(shape(Layout(1, 1, 8, replicas=4), 2, 4, True), 1, 1), Candidate(shape(Layout(4, 1, 1, 2), 6, 12), 1, 1)]


@pytest.mark.parametrize("number, gpu", [(0, True), (1, False), (2, True), (2, False), (3, True), (4, True), (5, False)])
def test_a_trial_is_the_simulation_and_its_short_cut_is_near(cluster, number, gpu):
    """In full: the figures of `hpcmoe simulate` for the candidate's job. With rounds left out: near."""
    c = CASES[number]
    t = asked(cluster, prompt=12, outputs=24, gpu=gpu, load="power-law:1" if number % 2 else "uniform")
    stand = Stand(t)
    short, whole = run_trial(stand, c), run_trial(stand, c, whole=True)
    report = report_of(simulate_run.simulate(t._replace(job=job_of(t, c), lengths=[t.lengths[0]] * c.sequences)))
    assert whole.run_s == pytest.approx(report["elapsed_time"], rel=1e-9)
    assert whole.tokens_per_s_per_gpu == pytest.approx(report["throughput"]["output_tokens_per_s_per_rank"], rel=1e-9)
    assert whole.tpot_ms == pytest.approx(report["latency"]["tpot_mean_ms"], rel=1e-9)
    assert whole.ttft_ms == pytest.approx(report["latency"]["ttft_mean_ms"], rel=1e-9)
    assert whole.link_share == pytest.approx(report["run"]["simulated"]["busiest_link"]["busy_share"], rel=1e-6)
    for name in ("run_s", "tokens_per_s_per_gpu", "tpot_ms", "ttft_ms"):
        assert getattr(short, name) == pytest.approx(getattr(whole, name), rel=NEAR), name
    for o in (short, whole):
        assert sum(o.terms_us) == pytest.approx(1e6 / o.tokens_per_s_per_gpu) and min(o.terms_us) > -1e-9
    phases = report["phases"]
    took = {name: whole.terms_us[TERMS.index(name)] * 1e-6 * c.sequences * 24 / 8 for name in TERMS}
    key = "gpu_s" if gpu else "busy_s"
    assert took["attention"] == pytest.approx(phases["attention"][key])
    assert took["experts: reading weights"] + took["experts: the rest"] == pytest.approx(phases["expert"][key])
    assert not gpu or took["sampling"] == pytest.approx(phases["sample"]["gpu_s"])


# ---------------------------------------------------------------- bounds, memory, pruning
@pytest.mark.parametrize("gpu, load", [(False, "uniform"), (True, "uniform"), (True, "power-law:1.2")])
def test_nothing_beats_its_bound(cluster, gpu, load):
    t = asked(cluster, requests=64, gpu=gpu, load=load, prompt=6, outputs=8)
    stand, worst = Stand(t), 0
    for c in random.Random(1).sample(everything(t), 25):
        bound, = bounds(stand, Frames(stand, c.shape), [(c.shape, [(c.micros, c.lanes)])])
        outcome = run_trial(stand, c)
        assert bound.candidate == c
        assert bound.tokens_per_s_per_gpu >= outcome.tokens_per_s_per_gpu and bound.tpot_ms <= outcome.tpot_ms, c.name
        worst += bound.tokens_per_s_per_gpu < 1.3 * outcome.tokens_per_s_per_gpu
    assert worst > 12  # and most are near: else nothing is pruned


def test_memory_is_the_simulators(cluster):
    """On ranks of ever less memory: a candidate fits where `simulate` lets it run with all of its requests at once."""
    text = CLUSTER.replace("memory_gib = 1.0", "memory_gib = {}")
    verdicts = []
    for gpu in (False, True):
        for gib in (0.0006, 0.0012, 0.003, 0.02):
            cluster.write_text(text.format(gib))
            t = asked(cluster, gpu=gpu)
            choices = Choices(t, set())
            some = [Candidate(s, *cut) for layout in choices.layouts for s in choices.shapes(layout) for cut in choices.cuts(layout)]
            for c in random.Random(2).sample([c for c in some if choices.takes_batch(c)], 25):
                job = job_of(t, c)
                try:
                    sizes, _ = simulate_run._room(t._replace(job=job, lengths=[t.lengths[0]] * c.sequences), c.shape.layout, 4)
                    runs = sizes.pages >= c.shape.sequences * c.micros if gpu else True  # a page holds a whole sequence here
                except UserError:
                    runs = False
                verdicts.append(runs)
                assert runs == (Room(t).needs(c).over <= 0), (gib, gpu, c.name)
    assert 40 < sum(verdicts) < len(verdicts) - 40


@pytest.mark.parametrize("gpu, load, limited", [(True, "uniform", False), (False, "power-law:1", True)])
def test_pruning_loses_nothing(cluster, gpu, load, limited):
    """All candidates tried one by one: the same front, the same best, the same runner-up, in one process or two."""
    cluster.write_text(CLUSTER.replace("= 4\n", "= 2\n"))  # nodes of two ranks, an adapter beside each
    t = asked(cluster, gpus=4, requests=8 if gpu else 4, prompt=2, outputs=3, sets=["layout.leaders=all"] * gpu, gpu=gpu, load=load,
              model=replace(LAYERS4, layers=2))
    fixed = {"layout.leaders"} if gpu else set()
    stand = Stand(t)
    all_ = [run_trial(stand, c) for c in everything(t, fixed)]
    free = front(all_)
    tpot_ms = free[len(free) // 2].tpot_ms * 1.001 if limited else None
    found = search(t, fixed, tpot_ms, lambda *_: None, processes=1 + limited)
    assert len(found.bounds) == len(all_) and len(found.outcomes) < 0.7 * len(all_)
    assert front(found.outcomes) == free
    assert within(found.outcomes, tpot_ms)[0] == within(all_, tpot_ms)[0]
    assert runner_up(found.outcomes, tpot_ms) == runner_up(all_, tpot_ms)


# ---------------------------------------------------------------- from the command line
def command(*words):
    from hpcmoe.cli import main
    return main(["plan", *map(str, words)])


SMALL = ["--gpus", 8, "--prompt-tokens", 4, "--output-tokens", 3, "--sequences", 16, "--processes", 1]
FEWER = ["--set", "layout.leaders=all", "--set", "layout.tp=1"]  # quick enough for a test


def test_a_small_cluster_in_full(cluster, tmp_path, capsys, monkeypatch):
    """The text to the letter; all files; the same bits again."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    model_file(tmp_path)
    words = ["model.toml", "--cluster", cluster.name, *SMALL, *FEWER, "--tpot-ms", "6", "--calibration", ROOT / "inputs/calibrations/demo_core.toml"]
    made = []
    for name in "ab":
        assert command(*words, "--out", f"{name}/plan.json", "--script", f"{name}/plan.sbatch", "--plot", f"{name}/plan.svg") == 0
        text = capsys.readouterr().out.replace(f"{name}/plan", "plan")
        made.append([text] + [(tmp_path / name / f"plan{end}").read_text().replace(f"{name}/plan", "plan") for end in (".json", ".sbatch", ".toml", ".svg")])
    assert made[0] == made[1]
    assert made[0][0] == (ROOT / "tests" / "golden" / "plan.txt").read_text()
    told_json, script, job = json.loads(made[0][1]), made[0][2], made[0][3]
    assert len(told_json["candidates"]) == told_json["bounded_away"] + told_json["simulated"]
    figures = [dict(zip(told_json["columns"], row)) for row in told_json["candidates"]]
    tried = [x for x in figures if x["tpot_ms"]]
    assert len(tried) == told_json["simulated"]
    assert told_json["best"]["tokens_per_s_per_gpu"] == max(x["tokens_per_s_per_gpu"] for x in tried if x["tpot_ms"] <= 6)
    best = told_json["best"]
    assert f'LAYOUT="dp={best["dp"]} pp={best["pp"]} ep={best["ep"]} tp={best["tp"]}"' in script and "--nodes=2" in script
    assert f'ep = {best["ep"]}' in job and 'file = "model.h5"' in job


BIG = ('family = "mixtral"\nvocab = 128\nd = 1024\nlayers = 16\ncontext = 64\n[attention]\nheads = 2\nkv_heads = 2\nhead_dim = 32\n[router]\nexperts = 4\n'
       'top_k = 2\n[expert]\nf = {}\n')


@pytest.mark.parametrize("words, expected", [
    (["--gpus", "9"], "--gpus = 9: expected 1 to 8"),
    (["--gpus", "0"], "--gpus = 0: expected 1 to 8"),
    (["--tpot-ms", "0.01"], "--tpot-ms = 0.01: expected at least "),
    (["--tpot-ms", "-1"], "--tpot-ms = -1.0: expected a number of ms > 0"),
    (["--tpot-ms", "5", "--output-tokens", "1"], "--tpot-ms = 5.0: expected --output-tokens >= 2"),
    (["--plot", "x.svg", "--output-tokens", "1"], "--plot = 'x.svg': expected --output-tokens >= 2"),
    (["--load", "zipf"], "--load = 'zipf': expected uniform, power-law"),
    (["--set", "layout.ep=3"], "no candidate"),
    (["--set", "layout.placement=p.json"], "--set = 'layout.placement': expected another key"),
    (["--set", "run.max_sequences=7"], "no candidate"),
    (["--set", "run.transport=staged"], "run.transport = 'staged': expected another one"),
    (["--sequences", "0"], "throughput.sequences = 0: expected a number >= 1"),
    (["--prompt-tokens", "64"], "= 67: expected at most 64, the model's context"),
    (["--processes", "0"], "--processes = 0: expected a number >= 1"),
    (["--out", "/dev/null/x/plan.json"], "/dev/null/x"),
])
def test_bad_input_is_one_clear_error(cluster, tmp_path, capsys, words, expected):
    assert command(model_file(tmp_path), "--cluster", cluster, *SMALL, *FEWER, *words) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("hpcmoe: plan: ")]  # progress, on a slow machine
    assert len(err) == 1 and expected in err[0], err


def test_a_model_that_does_not_fit_says_what_would(cluster, tmp_path, capsys):
    """Experts of 64 MiB, 64 of them: 4 GiB on two ranks of one, which four can hold; and of 512 MiB, which nothing can."""
    for f, expected in ((5461, "on 8 ranks this would fit: dp="), (43690, "no layout of up to 8 ranks, those of the cluster, was found to fit")):
        model = model_file(tmp_path, BIG.format(f))
        assert command(model, "--cluster", cluster, *SMALL, "--gpus", "4") == 2
        err, = capsys.readouterr().err.splitlines()
        assert "no layout fits: the one that lacks least, dp=" in err and "more than the 1.0 GiB that a rank can use" in err and expected in err, err


@pytest.mark.mpi
def test_its_script_runs_its_job(tmp_path):
    """On this machine's cores, without Slurm: the script itself, mpiexec for srun, starts the ranks of the layout with the job beside it."""
    from mpi import environment
    from tiny import tiny_model
    tiny_model(tmp_path / "model.h5")
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    assert command(tmp_path / "model.h5", "--cluster", tmp_path / "cluster.toml", "--gpus", 4, "--prompt-tokens", 4, "--output-tokens", 3,
                   "--sequences", 16, "--set", "layout.dp=1", "--set", "layout.pp=2", "--set", "layout.tp=1", "--set", "layout.leaders=all",
                   "--processes", 1, "--script", tmp_path / "plan.sbatch", "--out", tmp_path / "plan.json") == 0
    env = environment({"HPCMOE_VENV": sys.prefix, "LAUNCH": "mpirun", "OUT": str(tmp_path / "out")})
    done = subprocess.run(["bash", str(tmp_path / "plan.sbatch")], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    report, best = json.loads((tmp_path / "out" / "report.json").read_text()), json.loads((tmp_path / "plan.json").read_text())["best"]
    assert report["run"]["layout"] == {name: best[name] for name in ("dp", "pp", "ep", "tp")} == {"dp": 1, "pp": 2, "ep": 2, "tp": 1}
    assert report["run"]["schedule"]["micro_batches"] == best["micro_batches"] and report["run"]["schedule"]["lanes"] == best["lanes"]
    assert report["run"]["sequences_at_once"] == best["sequences_at_once"] == report["num_requests"]
