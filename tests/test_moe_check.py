"""`hpcmoe calibrate check --moe`: grouped products against loops over tiles, rows of the busiest rank, ratios known by hand, the real tables."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from hpcmoe.cluster import moe_check
from hpcmoe.cluster.kernels import SHIPPED, read_calibration
from hpcmoe.cluster.moe_check import Case
from hpcmoe.errors import UserError
from mpi import ROOT

ANCHORS = Path(os.environ.get("HPCMOE_SHARED", ROOT.parent / "shared")) / "anchors" / "gpu"
H100 = read_calibration(SHIPPED / "h100_sxm.toml")
HEAD = "num_tokens,hidden_size,inter_size,topk,num_experts,moe_tp_size,moe_ep_size,distribution,latency_ms"


def one_group(g, m_e, n: int, k: int) -> float:
    """s of a grouped product, by loops over tile shapes, splits and experts."""
    best = math.inf
    for tile in g.tile:
        for a, b in {(tile.rows, tile.columns), (tile.columns, tile.rows)}:
            for s in g.splits:
                tiles = sum(-(-m // a) for m in m_e) * -(-n // b) * s
                k_split = math.ceil(k / s / 64) * 64
                waves = -(-tiles // g.units)
                compute = waves * (2 * a * b * k_split / (tile.efficiency * g.unit_gflop_per_s * 1e9) + g.wave_us * 1e-6)
                compute *= 1 + g.hot_fraction * compute / (compute + g.hot_us * 1e-6)
                memory = sum(g.item_bytes * (m * k + n * k + m * n) for m in m_e if m) / (g.memory_gb_per_s * 1e9)
                read = [g.item_bytes * k_split * (min(a, m) + min(b, n)) for m in m_e for _ in range(-(-m // a) * -(-n // b) * s)]
                unit, cache = waves * sum(read) / len(read) / (g.unit_gb_per_s * 1e9), sum(read) / (g.cache_gb_per_s * 1e9)
                sums = 2 * g.item_bytes * sum(m_e) * n * (s - 1) / (g.cache_gb_per_s * 1e9)
                body = sum(t**g.sharpness for t in (memory, compute, unit, cache))**(1 / g.sharpness)
                best = min(best, g.floor_us * 1e-6 + body + sums + g.split_us * 1e-6 * math.log2(s))
    return best


@pytest.mark.parametrize("m_e, n, k", [([7], 300, 500), ([1, 0, 64, 65], 700, 1100), ([3] * 20, 512, 2048), ([0, 500], 2000, 100)])
def test_a_grouped_product_shares_waves(m_e, n, k):
    found = float(H100.gemm.grouped_seconds(m_e, n, k))
    assert found == pytest.approx(one_group(H100.gemm, m_e, n, k), rel=1e-9)
    assert found <= sum(float(H100.gemm_s(m, n, k)) for m in m_e) * (1 + 1e-9)  # never worse than one after the other
    assert found >= max(float(H100.gemm_s(m, n, k)) for m in m_e) * (1 - 1e-9)


def test_nothing_takes_no_time_and_groups_are_broadcast():
    m_ie = np.array([[0, 0], [5, 0], [5, 9]])
    found = H100.gemm.grouped_seconds(m_ie, np.full(3, 256), np.full(3, 128))
    assert found[0] == 0 and found[1] == pytest.approx(float(H100.gemm_s(5, 256, 128))) and found[2] > 0


# ---------------------------------------------------------------- rows
@pytest.mark.parametrize("tokens, top_k, experts, ep", [(1, 8, 128, 1), (3, 2, 16, 4), (100, 8, 128, 8), (64, 1, 64, 64), (1000, 10, 512, 2)])
def test_balanced_rows(tokens, top_k, experts, ep):
    """Token by token: different experts, as even as can be."""
    count, stride = [0] * experts, -(-experts // top_k)
    for t in range(tokens):
        chosen = {int((t if tokens >= stride else t * stride / tokens) + i * stride) % experts for i in range(top_k)}
        for e in chosen:
            count[e] += 1
    case = Case(tokens, 64, 64, top_k, experts, 1, ep, "balanced", 1.0)
    rows, = moe_check.rows_of(case)
    assert rows.tolist() == count[:experts // ep]
    if tokens >= stride and experts % top_k == 0:
        assert max(count) - min(count) <= top_k


@pytest.mark.parametrize("tokens, top_k, experts, ep, exponent", [(1, 8, 128, 4, "1.2"), (64, 2, 16, 16, "1.01"), (5000, 8, 64, 8, "1"), (300, 4, 32, 1, "0.5")])
def test_rows_of_a_power_law(tokens, top_k, experts, ep, exponent):
    """The busiest rank's; none lost; many tokens: shares between the bounds of the density, and its median in closed form."""
    case = Case(tokens, 64, 64, top_k, experts, 1, ep, f"power_law_{exponent}", 1.0)
    found = moe_check.rows_of(case)
    assert found.shape == (moe_check.DRAWS, experts // ep) and (found >= 0).all()
    assert (found.sum(axis=1) * ep >= tokens * top_k).all()
    whole = np.concatenate([moe_check._power_law(case._replace(ep=1), float(exponent), np.random.default_rng(s)) for s in range(40)])
    assert whole.sum() == 40 * tokens * top_k
    if tokens == 5000:  # density 1 / x on [1, 4000]: logarithms are even, so the median is sqrt(4000)
        assert np.median(np.log(np.maximum(whole, 1) / whole.mean())) == pytest.approx(np.log(math.sqrt(4000) / (3999 / math.log(4000))), abs=0.3)


# ---------------------------------------------------------------- the command
def write(path, *lines: str) -> str:
    path.write_text("\n".join((HEAD, *lines)) + "\n")
    return str(path)


def test_ratios_by_hand(tmp_path, capsys):
    """One expert of one rank is two products and an activation; measured at twice that, and of experts without a gate at the same."""
    from hpcmoe.cli import _main
    gated = float(H100.gemm_s(64, 2048, 512) + H100.gemm_s(64, 512, 1024) + H100.elementwise_s(64 * 3 * 1024 * 2))
    plain = float(H100.gemm_s(64, 256, 512) + H100.gemm_s(64, 512, 256) + H100.elementwise_s(64 * 2 * 256 * 2))
    path = write(tmp_path / "moe.csv", f"64,512,1024,1,1,1,1,balanced,{2e3 * gated!r}", f"64,512,256,1,1,1,1,balanced,{1e3 * plain!r}")
    cases = moe_check.read_layers(path, ungated=(256,))
    found = moe_check.ratios(H100, cases)
    np.testing.assert_allclose(found.grouped, [0.5, 1.0], rtol=1e-9)
    np.testing.assert_allclose(found.one_by_one, [0.5, 1.0], rtol=1e-9)
    passes = 2 * float(H100.elementwise_s(8 * 64)) + float(H100.elementwise_s(2 * 64 * 512 * 2))  # nothing is others': sort, sum
    np.testing.assert_allclose(found.with_passes, [0.5 + passes / (2 * gated), 1 + passes / plain], rtol=1e-9)
    many = Case(8, 512, 1024, 2, 8, 2, 4, "balanced", 1.0)  # a quarter of the experts, half of their width; 16 choices, 4 of them here
    others = 12 * (1024 + 512 + 1024 + 512) * 2 / (H100.elementwise.gb_per_s * 1e9)
    assert moe_check.passes_s(H100, many, 4) == pytest.approx(2 * float(H100.elementwise_s(128)) + others + float(H100.elementwise_s(24 * 512 * 2)))
    assert _main(["calibrate", "check", str(SHIPPED / "h100_sxm.toml"), "--moe", path, "--ungated", "256"]) == 0
    printed = capsys.readouterr().out
    assert "512 x 1024, 1, top-1                      1     0.50" in printed and "rows                                      2     0.75" in printed


@pytest.mark.parametrize("line, words", [
    ("64,512,1024,1,1,1,1,balanced,0", "line 2: latency_ms = '0'"), ("x,512,1024,1,1,1,1,balanced,1", "line 2: num_tokens = 'x'"),
    ("64,512,1024,1,1,1,1,even,1", "distribution = 'even': expected balanced or"), ("64,512,1024,1,8,1,3,balanced,1", "8 experts, top-1, on ep = 3"),
    ("64,512,1024,2,1,1,1,balanced,1", "top-2"), ("", "no rows")])
def test_wrong_tables_are_refused(tmp_path, line, words):
    with pytest.raises(UserError, match=words):
        moe_check.read_layers(write(tmp_path / "moe.csv", *[line] if line else []))


def test_wrong_files_are_refused(tmp_path):
    from hpcmoe.cli import _main
    (tmp_path / "moe.csv").write_text("num_tokens,latency_ms\n1,1\n")
    for args, words in ((["--moe", str(tmp_path / "moe.csv")], "no column"), (["--moe", str(tmp_path / "none.csv")], "cannot be read"),
                        (["--moe", str(tmp_path / "moe.csv"), "--hold-out", "5"], "--hold-out is for --table")):
        with pytest.raises(UserError, match=words):
            _main(["calibrate", "check", str(SHIPPED / "h100_sxm.toml"), *args])


@pytest.mark.skipif(not ANCHORS.exists(), reason="the tables of measured kernels (../shared/anchors/gpu) are not here")
@pytest.mark.parametrize("chip", ["h100_sxm", "h200_sxm"])
def test_layers_that_nothing_was_fitted_to(chip):
    """Of every twentieth row. One GPU with all experts: near to what that engine takes; over all layouts it takes up to twice as long, and hardly
    ever less than predicted."""
    cases = moe_check.read_layers(str(ANCHORS / f"{chip}_moe_bf16.csv"), ungated=(1856, 5120))[::20]
    found = moe_check.ratios(read_calibration(SHIPPED / f"{chip}.toml"), cases)
    alone = np.array([case.ep == case.tp == 1 for case in cases])
    assert 0.85 < np.median(found.with_passes[alone]) < 1.1
    low, middle, high = np.percentile(found.with_passes, (5, 50, 95))
    assert 0.4 < low and 0.7 < middle < 1.0 and high < 1.2
