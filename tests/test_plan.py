"""`hpcmoe plan`: short cuts against the simulator in full, pruning against trying everything, what it writes, bad input."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
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
from hpcmoe.plan.run import plan
from hpcmoe.plan.search import Worker, front, order, runner_up, search, within
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
        assert sum(o.terms_us) == pytest.approx(1e6 / o.tokens_per_s_per_gpu) and min(o.terms_us) > -1e-3 * max(o.terms_us)
    phases = report["phases"]
    took = {name: whole.terms_us[TERMS.index(name)] * 1e-6 * c.sequences * 24 / 8 for name in TERMS}
    key = "gpu_s" if gpu else "busy_s"
    assert took["attention"] == pytest.approx(phases["attention"][key])
    assert took["experts: reading weights"] + took["experts: arithmetic"] == pytest.approx(phases["expert"][key])
    assert not gpu or took["sampling"] == pytest.approx(phases["sample"]["gpu_s"])


# ---------------------------------------------------------------- bounds, memory, pruning
@pytest.mark.parametrize("gpu, load", [(False, "uniform"), (True, "uniform"), (True, "power-law:1.2")])
def test_nothing_beats_its_bound(cluster, gpu, load):
    t = asked(cluster, requests=64, gpu=gpu, load=load, prompt=6, outputs=8)
    stand, worst = Stand(t), 0
    for c in random.Random(1).sample(everything(t), 25):
        bound, = bounds(stand, Frames(stand, c.shape), c.shape, [(c.micros, c.lanes)])
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
    t = asked(cluster, gpus=4, requests=8 if gpu else 4, prompt=2, outputs=3, sets=["layout.leaders=all"] * gpu, gpu=gpu, load=load)
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
