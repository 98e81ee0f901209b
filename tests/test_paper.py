"""`hpcmoe paper`: its steady decode against whole simulations, its roofline by hand, what constants stand on, and the committed page."""

import argparse
import re
from dataclasses import replace

import numpy as np
import pytest

from hpcmoe.cluster.clusterfile import read_cluster
from hpcmoe.errors import UserError
from hpcmoe.jobfile import read_job
from hpcmoe.paper import claims, crossover, document, goal, paper_cli, roofline, scaling, setup, steady
from hpcmoe.paper.constants import ASSUMED, CITED, FITTED, MEASURED, free, network, no_network, read_constants
from hpcmoe.paper.steady import Steady
from hpcmoe.paper.words import layout_name, rate, table
from hpcmoe.parallel.layout import Layout
from hpcmoe.simulate.loads import read_shares
from hpcmoe.simulate.run import Told, simulate
from mpi import ROOT

PAGE = ROOT / "docs" / "paper.md"


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    paper_cli.add_parser(parser.add_subparsers())
    return parser.parse_args(["paper", "--out", "docs/paper.md", "--jobs", "1", *words])


@pytest.fixture(scope="module")
def given() -> setup.Setup:
    return setup.read(arguments())


# ---------------------------------------------------------------- steady decode
@pytest.mark.parametrize("layout, sets", [(Layout(1, 4, 16), []), (Layout(1, 2, 1, 8), ["layout.tp=8"]), (Layout(2, 2, 16), []), (Layout(1, 4, 16), ["run.transport=hierarchical"])])
def test_one_batch_in_flight_is_a_step_of_a_whole_simulation(given, layout, sets):
    """A run through the engine's own batching: the step that looks at so many keys takes as long."""
    sets = [f"layout.{name}={getattr(layout, name)}" for name in ("dp", "pp", "ep")] + ["run.micro_batches=1", "run.batch_tokens=256", "weights.file=-", "task=throughput", *sets]
    job = read_job(None, sets)
    shares, words = read_shares("uniform", given.model, 256)
    done = simulate(Told(job, given.model, *given.machine, layout.size, [(1, 5)] * 256 * layout.dp, shares, words, []))
    leader = next(r for r in done.records if r.steps)
    for keys in (2, 4):  # of the steps behind the first, which is the prompt's
        step = leader.steps[keys - 1]
        case = given.case(layout, 256, keys=keys, hierarchical="run.transport=hierarchical" in sets)
        assert steady.steady(case, given.machine).tpot_s == pytest.approx(step.end_s - step.start_s, rel=1e-9)


def test_few_rounds_say_what_many_do(given, monkeypatch):
    cases = [given.proposal(micros=4), given.proposal(2048, 8, lanes=2), given.case(Layout(4, 4, 4), 256, 4, skew=1.2), given.case(Layout(1, 2, 16, 2), 1024, 4, lanes=2)]
    few = [steady.steady(case, given.machine).tpot_s for case in cases]
    monkeypatch.setattr(steady, "WARM", 12)
    monkeypatch.setattr(steady, "MEASURED", 8)
    assert few == pytest.approx([steady.steady(case, given.machine).tpot_s for case in cases], rel=2e-3)


def test_several_processes_say_the_same(given):
    cases = [given.proposal(batch) for batch in (64, 128)] + [given.proposal(1 << 24)]
    found = given.clock(cases)
    assert found == replace(given, jobs=2).clock(cases)
    assert found[2] is None and all(found[:2])  # the last does not fit
    with pytest.raises(UserError, match="pages|more than"):
        given.must(cases[2:])


def test_copies_are_dealt_to_the_heaviest(given):
    """One slot per place: rows of the busiest of 64 are those of exact copies (parallel/balance.py), as whole rows."""
    own = steady.steady(given.case(Layout(1, 1, 64, 1, "all", 48), 4096, skew=1.2), given.machine)
    without = steady.steady(given.proposal(4096, skew=1.2), given.machine)
    assert 1 < own.busiest < 1.3 < without.busiest


# ---------------------------------------------------------------- roofline
def test_the_roofline_by_hand(given):
    """Bytes over rates of the proposal as plain sums, 16 bits, 64 rows on each leader, 128 at each expert, half of the 16 places on the other node."""
    d, f, tb, nic = 8192, 32768, 3.35e12, 50e9
    p = roofline.parts(given.proposal(), given.sheet, 8)
    assert p.attention == pytest.approx(4 * d * 8192 * 2 / tb) and p.expert == pytest.approx(2 * d * f * 2 / tb)
    assert p.cache == pytest.approx(64 * 24 * 2 * 8192 * 2 / tb) and p.head == pytest.approx(32000 * d * 2 / tb)
    assert p.exchange == pytest.approx(2 * 64 * 2 * d * 2 / 16 * 8 / nic) and p.sums == 0
    assert roofline.tpot_s(given.proposal(), p) == pytest.approx(4 * p.layer + p.head + 3 * 64 * d * 2 / nic)
    q = roofline.parts(given.baseline(), given.sheet, 8)
    assert q.expert == pytest.approx(16 * 2 * d * f * 2 / 8 / tb) and q.exchange == 0  # 128 rows of each of 16 experts: weights take longer
    assert q.sums == pytest.approx(2 * 2 * 7 / 8 * 1024 * d * 2 / 450e9)
    assert q.head == pytest.approx(2 * 1024 * 32000 * d / 8 / 989.5e12)               # 1,024 rows: arithmetic does


def test_nothing_is_faster_than_its_roofline(given):
    for tokens in (256, 16384):
        for _, case in crossover.cases_of(given, 8192, tokens, None):
            p = roofline.parts(case, given.reached, given.ranks_per_node)
            assert steady.steady(case, given.machine).tpot_s > roofline.weights_s(case, p) + case.model.layers * p.cache, case.layout


# ---------------------------------------------------------------- constants
CALIBRATION = """machine = "x"
source = "y"

[gemm]
floor_us = 2.5   # assumed, but of products

[host]
launch_us = 5.0   # assumed: by nobody
sync_us = 1_0.0 # measured: on a GPU
[attention]
kv_gb_per_s = 3e3   # fitted: to this
                    # and, once more, to that; nothing is assumed
floor_us = 3.0
score_ns = 0.0   # a data sheet
"""


def test_what_constants_stand_on(tmp_path):
    (tmp_path / "a.toml").write_text("name = 'x'\n[nodes]\ncount = 4  # assumed\n[[switch]]\nlatency_us = 1.0  # assumed\n[[switch]]\nlatency_us = 2.0  # cited\n")
    (tmp_path / "b.toml").write_text(CALIBRATION)
    found = {c.name: c for c in read_constants(tmp_path / "a.toml", tmp_path / "b.toml")}
    assert {name: c.standing for name, c in found.items()} == {
        "switch[0].latency_us": ASSUMED, "switch[1].latency_us": CITED, "host.launch_us": ASSUMED, "host.sync_us": MEASURED,
        "attention.kv_gb_per_s": ASSUMED, "attention.floor_us": ASSUMED, "attention.score_ns": CITED}  # assumed: said, or nothing is
    assert found["host.sync_us"].value == 10 and found["attention.kv_gb_per_s"].source == "fitted: to this and, once more, to that; nothing is assumed"


def test_shipped_constants_have_values_and_sources(given):
    for c in given.constants:
        whole = getattr(given.machine, c.place)
        name, _, number = c.table.partition("[")
        owner = getattr(whole, name)
        assert getattr(owner[int(number[:-1])] if number else owner, c.key) == c.value and c.source, c.name
    assert {c.standing for c in given.constants} >= {ASSUMED, FITTED, CITED}


def test_what_is_free_is_free(given):
    launch, nic = (next(c for c in given.constants if c.name == name) for name in ("host.launch_us", "nic.efficiency"))
    machine = free(given.machine, [launch, nic])
    assert machine.calibration.launch_s == 0 and machine.cluster.nic.efficiency == 1 and machine.calibration.sync_s == given.machine.calibration.sync_s
    assert network(given.machine, 2).cluster.nic.bandwidth_gb_per_s == 2 * given.machine.cluster.nic.bandwidth_gb_per_s
    own, alone = (steady.steady(given.proposal(), m) for m in (given.machine, no_network(given.machine)))
    kernels = sum(own.device_s.values())
    assert own.device_s == alone.device_s and kernels < alone.tpot_s < own.tpot_s


# ---------------------------------------------------------------- the page
def test_the_committed_page_is_what_the_command_makes(given):
    """All but the long sections, and of those the fast parts. Where this fails: python -m hpcmoe paper --out docs/paper.md."""
    page = PAGE.read_text()
    compared = claims.compared(given, claims.claims(given))
    for part in (document.head(given, setup.command(arguments())), claims.assumption(given), *compared, document.constants(given)):
        assert part.rstrip() in page
    assert goal._ladder(given, claims.claims(given)[1]) in page and goal._bounds(given) in page
    key = (given.model.expert.f, 1024, 1.2)
    cell, = crossover.cells(given, [key])
    row = next(line for line in page.splitlines() if line.startswith("| skew 1.2 | 32,768 |"))
    assert row.split(" | ")[3] == f"{cell.winner}: {cell.ratio:.2f}"


def test_pictures_are_there_and_linked():
    linked = re.findall(r"\]\((pictures/[^)]+)\)", PAGE.read_text())
    assert sorted(linked) == ["pictures/paper-crossover.svg", "pictures/paper-goal.svg", "pictures/paper-scaling.svg"]
    assert all((PAGE.parent / name).stat().st_size > 1000 for name in linked)


def test_other_widths_are_said(given):
    other = setup.read(arguments("--hidden", "4096", "--expert-width", "14336", "--attention-width", "4096", "--top-k", "1", "--context", "512"))
    m = other.model
    assert (m.d, m.expert.f, m.attention.heads * m.attention.head_dim, m.router.top_k, other.keys) == (4096, 14336, 4096, 1, 512)
    assert setup.command(arguments("--hidden", "4096")) == "python -m hpcmoe paper --out docs/paper.md --hidden 4096"
    assert claims.claims(other)[1].own.tpot_s < claims.claims(given)[1].own.tpot_s


def test_the_same_data_gives_the_same_picture(tmp_path):
    plots = pytest.importorskip("hpcmoe.report.plots")
    pytest.importorskip("matplotlib")
    panel = plots.Panel("even", [[0, 1], [1, -1]], [["1.1", "0.9"], ["0.8", "-"]])
    for draw in (lambda path: plots.plot_maps([panel, panel], ["ours", "theirs"], ["1", "2"], ["3", "4"], ("x", "y"), path),
                 lambda path: plots.plot_series([plots.Series("a", [1, 2, 4], [3, 2, 1])], ("x", "y"), path, "x")):
        first, second = (draw(tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
        assert first == second and len(first) > 1000


# ---------------------------------------------------------------- small things
def test_pareto_is_those_that_none_beats():
    rng = np.random.default_rng(0)
    tried = [goal.Tried(None, Steady(float(t), int(n), 1, {}, 1.0)) for t, n in zip(rng.integers(1, 9, 40), rng.integers(1, 99, 40))]
    brute = {(t.own.tpot_s, t.own.tokens_per_s) for t in tried if not any(
        (o.own.tpot_s <= t.own.tpot_s and o.own.tokens_per_s > t.own.tokens_per_s) or (o.own.tpot_s < t.own.tpot_s and o.own.tokens_per_s >= t.own.tokens_per_s) for o in tried)}
    assert {(t.own.tpot_s, t.own.tokens_per_s) for t in goal.pareto(tried)} == brute


def test_the_least_factor():
    assert claims._least(lambda x: 10 / x, 2.0) == pytest.approx(5, rel=0.011)
    assert claims._least(lambda x: 3 + 1 / x, 2.0) is None


def test_words():
    assert (rate(1.234e6), rate(450e3)) == ("1.23 M", "450 k") and layout_name(Layout(1, 2, 32, 1, "all", 16)) == "`pp=2 ep=32`, 16 copies"
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    with pytest.raises(ValueError, match="head of 2"):
        table(["a", "b"], [["1"]])


def test_a_stage_of_more_gpus_has_more_nodes(given):
    assert scaling._large(given.machine, 1024).cluster.nodes.count == 128 and scaling._large(given.machine, 32).cluster.nodes.count == 8


@pytest.mark.parametrize("words, said", [
    (["--hidden", "0"], "--hidden = 0: expected a number >= 1"), (["--attention-width", "1000"], "--attention-width = 1000: expected a multiple of 1024"),
    (["--expert-width", "100"], "--expert-width = 100: expected a multiple of 8"), (["--top-k", "9"], "--top-k = 9: expected at most 8"),
    (["--memory-gb-per-s", "-1"], "--memory-gb-per-s = -1.0: expected a number > 0"), (["--cluster", "none.toml"], "none.toml: cannot be read"),
    (["--cluster", "inputs/clusters/demo_2_cores.toml"], "nodes.count = 1: expected at least")])
def test_bad_input(words, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=re.escape(said)):
        setup.read(arguments(*words))


def test_every_shipped_cluster_of_gpus_is_taken():
    for path in sorted(ROOT.glob("inputs/clusters/*.toml")):
        if read_cluster(path).ranks >= 64:
            assert setup.read(arguments("--cluster", str(path))).memory_gb_per_s > 0
