"""`hpcmoe balance`: its figures against plain loops over steps and rows, its made-up routing against the closed form."""

import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from hpcmoe.cluster.balance_run import power_law, rows_of_ranks, study
from hpcmoe.parallel.balance import heaviest, lower_bound, plan


def printed(*arguments) -> str:
    """What `hpcmoe balance` prints, in this process. Raises UserError where it would say so."""
    import contextlib
    import io

    from hpcmoe.cli import _main
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert _main(["balance", *map(str, arguments)]) == 0
    return out.getvalue()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=5, max_size=5), st.integers(0, 10**6), st.sampled_from([[1] * 8, [3, 3, 2], [4, 4]]))
def test_rows_are_dealt_to_copies_by_turns(rows_e, seed, rooms):
    """Row after row, by a plain loop."""
    expert_s = np.concatenate([np.arange(5), np.random.default_rng(seed).integers(0, 5, 3)])
    place_s = [r for r, room in enumerate(rooms) for _ in range(room)]
    rows_r = [0] * len(rooms)
    for e, rows in enumerate(rows_e):
        copies = [s for s in range(8) if expert_s[s] == e]
        for row in range(rows):
            rows_r[place_s[copies[row % len(copies)]]] += 1
    assert rows_of_ranks(np.array([rows_e]), expert_s, rooms).tolist() == [rows_r]


@pytest.mark.parametrize("rooms", [[1] * 6, [1] * 9, [3, 3, 2]])
def test_figures_are_those_of_a_plain_loop(rooms):
    rng = np.random.default_rng(1)
    rows_tle = rng.poisson([1, 2, 3, 8, 20, 30], size=(7, 2, 6))
    found = study(rows_tle, rooms)
    for layer in range(2):
        early_e, total_e = rows_tle[:3, layer].sum(axis=0), rows_tle[:, layer].sum(axis=0)
        expert_s, ratios, least, busiest = plan(early_e, rooms), [], [], []
        for step in range(3, 7):
            rows_e = rows_tle[step, layer]
            rows_r = rows_of_ranks(rows_e[None], expert_s, rooms)[0]
            assert rows_r.sum() == rows_e.sum()
            ratios.append(rows_r.max() * len(rooms) / rows_e.sum())
            least.append(lower_bound(rows_e, rooms) * len(rooms) / rows_e.sum())
            busiest.append(rows_r.max())
        assert found.later_l[layer] == pytest.approx(np.mean(ratios)) and found.even_l[layer] == pytest.approx(np.mean(1 / np.array(ratios)))
        assert found.least_l[layer] == pytest.approx(np.mean(least)) and found.rows_l[layer] == np.mean(busiest)
        assert found.least_l[layer] <= found.later_l[layer]
        assert found.whole_l[layer] == pytest.approx(heaviest(plan(total_e, rooms), total_e, rooms) * len(rooms) / total_e.sum())


@pytest.mark.parametrize("exponent", [0.0, 1.01, 1.2])
def test_power_law_draws_without_replacement_as_the_closed_form_says(exponent):
    """Two choices: P(e) = p_e + sum over f of p_f p_e / (1 - p_f), within five standard deviations; the same draw again."""
    experts, tokens = 8, 40_000
    p_e = np.arange(1.0, experts + 1) ** -exponent
    p_e /= p_e.sum()
    expected_e = p_e + [sum(p_e[f] * p_e[e] / (1 - p_e[f]) for f in range(experts) if f != e) for e in range(experts)]
    rows_tle = power_law(exponent, experts, 2, tokens // 2, 2, 2, seed=3)
    for rows_te in rows_tle.transpose(1, 0, 2):
        assert (rows_te.sum(axis=1) == tokens).all() and rows_te.max() <= tokens // 2
        spread_e = np.sqrt(tokens * expected_e * (1 - expected_e))
        assert (np.abs(np.sort(rows_te.sum(axis=0))[::-1] - tokens * expected_e) <= 5 * spread_e).all()
    assert (power_law(exponent, experts, 2, tokens // 2, 2, 2, seed=3) == rows_tle).all()


def test_a_run_s_load_is_read_and_studied(tmp_path):
    """Two replicas, one with fewer steps; prints a line per number of spare slots."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 40, size=(2, 6, 3, 4)).astype(np.int32)
    rows[1, 4:] = 0
    with h5py.File(tmp_path / "expert_load.h5", "w") as file:
        file["rows"] = rows
        file["rows"].attrs["axes"] = "replica, step, layer, expert"
    out = printed("--load", tmp_path / "expert_load.h5", "--replicas", "0,3")
    assert "10 steps, 3 layers, 4 experts" in out
    total_le = rows.sum(axis=(0, 1))
    lines = {line.split()[0]: line.split()[2:] for line in out.splitlines() if " spare " in line}
    assert lines["0"][:2] == ["4", f"{np.mean(total_le.max(axis=1) * 4 / total_le.sum(axis=1)):.3f}"] and lines["3"][0] == "7"
    assert "dealt over 2 ranks" in printed("--load", tmp_path / "expert_load.h5", "--replicas", "4", "--ep", "2")


def refused(words: str, *arguments) -> None:
    from hpcmoe.errors import UserError
    with pytest.raises(UserError) as error:
        printed(*arguments)
    assert words in str(error.value)


def test_what_cannot_be_is_refused(tmp_path):
    for words, arguments in (("--replicas = '2,x'", ("--replicas", "2,x")), ("--replicas = -1", ("--replicas=-1",)), ("--ep = 17", ("--ep", "17")),
                             ("--replicas = 17", ("--ep", "2", "--replicas", "17")), ("--top-k = 17", ("--top-k", "17")),
                             ("--steps = 1", ("--steps", "1")), ("--seed = -1", ("--seed=-1",))):
        refused(words, "--power-law", "1.2", *arguments)
    refused("--power-law = nan", "--power-law", "nan")
    refused("none.h5: no such file", "--load", tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("x")
    refused("text.h5: cannot be read", "--load", tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["rows"] = np.zeros((1, 2, 3))
    refused("other.h5: expected expert_load.h5", "--load", tmp_path / "other.h5")
    with h5py.File(tmp_path / "short.h5", "w") as file:
        file["rows"] = np.ones((1, 1, 2, 4), dtype=np.int32)
        file["rows"].attrs["axes"] = "replica, step, layer, expert"
    refused("short.h5: steps with rows = 1", "--load", tmp_path / "short.h5")
