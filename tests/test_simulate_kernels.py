"""The kernel model: the formula against a plain loop, its laws, fits that find what made a table, errors on rows held out."""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.cluster import gemm_fit, links_fit
from hpcmoe.cluster.fit import FitError, least_squares
from hpcmoe.cluster.kernels import SHIPPED, gemm_toml, read_calibration
from hpcmoe.errors import UserError
from mpi import ROOT

ANCHORS = Path(os.environ.get("HPCMOE_SHARED", ROOT.parent / "shared")) / "anchors" / "gpu"
HELD_OUT = (5120, 14336, 3584)
needs_anchors = pytest.mark.skipif(not ANCHORS.exists(), reason="the tables of measured kernels (../shared/anchors/gpu) are not here")
size = st.integers(1, 20000)
H100, H200 = (read_calibration(SHIPPED / f"{name}.toml") for name in ("h100_sxm", "h200_sxm"))


def one_product(g, m: int, n: int, k: int) -> float:
    """s, by loops over all tiles and splits."""
    best = math.inf
    for tile in g.tile:
        for a, b in {(tile.rows, tile.columns), (tile.columns, tile.rows)}:
            for s in g.splits:
                tiles = -(-m // a) * -(-n // b) * s
                k_split = math.ceil(k / s / 64) * 64
                wave = 2 * a * b * k_split / (tile.efficiency * g.unit_gflop_per_s * 1e9) + g.wave_us * 1e-6
                compute = -(-tiles // g.units) * wave
                compute *= 1 + g.hot_fraction * compute / (compute + g.hot_us * 1e-6)
                memory = g.item_bytes * (m * k + n * k + m * n) / (g.memory_gb_per_s * 1e9)
                read = g.item_bytes * k_split * (min(a, m) + min(b, n))
                unit, cache = -(-tiles // g.units) * read / (g.unit_gb_per_s * 1e9), tiles * read / (g.cache_gb_per_s * 1e9)
                sums = 2 * g.item_bytes * m * n * (s - 1) / (g.cache_gb_per_s * 1e9)
                body = sum(t**g.sharpness for t in (memory, compute, unit, cache))**(1 / g.sharpness)
                best = min(best, g.floor_us * 1e-6 + body + sums + g.split_us * 1e-6 * math.log2(s))
    return best


@settings(deadline=None, max_examples=60)
@given(size, size, size)
def test_a_product_is_the_least_over_tiles_and_splits(m, n, k):
    assert float(H100.gemm_s(m, n, k)) == pytest.approx(one_product(H100.gemm, m, n, k), rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(size, size, size, st.integers(0, 2), st.integers(1, 3000))
def test_more_work_never_takes_less_time_and_never_beats_the_roofline(m, n, k, which, more):
    shape = [m, n, k]
    shape[which] += more
    for chip, flop, bandwidth in ((H100, 989.5e12, 3.35e12), (H200, 989.5e12, 4.8e12)):
        before, after = float(chip.gemm_s(m, n, k)), float(chip.gemm_s(*shape))
        assert after >= before * (1 - 1e-12)
        assert before >= max(2 * m * n * k / flop, 2 * (m * k + n * k + m * n) / bandwidth)


def test_sizes_are_broadcast_and_nothing_takes_no_time():
    m = np.array([0, 1, 17, 4096])
    times = H100.gemm_s(m, 1024, 2048)
    assert times.shape == (4,) and times[0] == 0
    np.testing.assert_allclose(times[1:], [float(H100.gemm_s(int(x), 1024, 2048)) for x in m[1:]])
    assert H100.gemm_s(m[:, None], np.array([64, 128]), 100).shape == (4, 2)
    assert float(H100.elementwise_s(0)) == float(H100.decode_s(0, 0, 8, 8, 64)) == H100.prefill_s([], [], 8, 8, 64) == 0


def test_attention_is_a_roofline():
    a = H100.attention

    def reading(nbytes: float) -> float:
        """Half of the ramp where it takes as long as the ramp is."""
        s, ramp = nbytes / (a.kv_gb_per_s * 1e9), a.ramp_us * 1e-6
        return s + ramp * s / (s + ramp)

    chunks = ([0, 1024], [2048, 512])  # a whole prompt of 2048, and 512 rows after 1024 others: arithmetic
    scores = 32 * (2048**2 / 2 + 1024 * 512 + 512**2 / 2 + a.extra_keys * (2048 + 512))
    assert H100.prefill_s(*chunks, 32, 8, 128) == pytest.approx((a.floor_us + 2 * a.segment_us) * 1e-6 + 4 * scores * 128 / (a.prefill_gflop_per_s * 1e9))
    slow = dataclasses.replace(H100, attention=dataclasses.replace(a, score_ns=2.0, chunk_part=1.0, segment_us=7.0, row_us=0.5, extra_keys=0.0, ramp_us=0.0))
    scores = 32 * (2048**2 + 1024 * 512 + 512**2)
    assert slow.prefill_s(*chunks, 32, 8, 128) == pytest.approx(
        (a.floor_us + 2 * 7) * 1e-6 + scores * (4 * 128 / (a.prefill_gflop_per_s * 1e9) + 2e-9))
    assert H100.prefill_s([4096], [2], 32, 8, 128) == pytest.approx(  # two rows: reading what they see
        (a.floor_us + a.segment_us) * 1e-6 + reading(2 * 128 * (2 * 4098 * 8 + 2 * 2 * 32)))
    keys, rows = 64 * 4096, 64  # decode: keys and values, queries in, rows out; 2 bytes each
    nbytes = 2 * 128 * (2 * keys * 8 + 2 * rows * 32)
    assert float(H100.decode_s(keys, rows, 32, 8, 128)) == pytest.approx((a.floor_us + 64 * a.row_us) * 1e-6 + reading(nbytes))
    assert float(slow.decode_s(keys, rows, 32, 8, 128)) == pytest.approx(
        (a.floor_us + 64 * 0.5) * 1e-6 + 32 * keys * (4 * 128 / (a.decode_gflop_per_s * 1e9) + 2e-9))
    assert float(H100.elementwise_s(1e9)) == pytest.approx(2.5e-6 + 1 / 2643)
    assert (H100.launch_s, H100.sync_s) == pytest.approx((5e-6, 3.8e-6))


# ---------------------------------------------------------------- fits
def test_least_squares_finds_the_least():
    """A power law with noise: the closed form of a linear regression of logarithms."""
    rng = np.random.default_rng(1)
    x = rng.uniform(1, 100, 200)
    y = 3 * x**0.7 * np.exp(rng.normal(0, 0.1, 200))
    found = least_squares(lambda p: np.exp(p[0]) * x**p[1], np.array([0.0, 0.0]), y)
    expected = np.linalg.lstsq(np.stack([np.ones(200), np.log(x)], axis=1), np.log(y), rcond=None)[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_errors_are_relative():
    e = FitError.of(np.array([1.1, 2.0, 0.5]), np.array([1.0, 2.0, 1.0]))
    assert (e.rows, e.mean, e.largest) == (3, pytest.approx(0.2), pytest.approx(0.5))
    assert e.p95 == pytest.approx(np.percentile([0.1, 0, 0.5], 95)) and e.bias == pytest.approx(math.log(1.1 / 2) / 3)


def test_a_fit_finds_the_model_that_made_the_table():
    """Times of the H200's model, fitted from the common start: shapes in between come out right to 3 %."""
    m, n, k = (x.ravel() for x in np.meshgrid([1, 16, 100, 700, 5000], [1024, 3000, 9000], [1024, 3000, 9000]))
    table = gemm_fit.Products(m, n, k, H200.gemm_s(m, n, k))
    found = gemm_fit.fit(gemm_fit.CHIPS["h200_sxm"], table)
    other = gemm_fit.Products(m, n + 500, k + 700, H200.gemm_s(m, n + 500, k + 700))
    assert gemm_fit.error(found, table).mean < 0.02 and gemm_fit.error(found, other).mean < 0.03


@needs_anchors
@pytest.mark.parametrize("chip, calibration", [("h100_sxm", H100), ("h200_sxm", H200)])
def test_products_held_out_are_predicted(chip, calibration):
    """The aim: mean absolute error below 10 %, 95th percentile below 25 %, of rows that the fit did not see."""
    rows = gemm_fit.read_products(str(ANCHORS / f"{chip}_gemm_bf16.csv"))
    held = rows.held_out(HELD_OUT)
    assert (held.sum(), (~held).sum()) == (780, 2160)
    error = gemm_fit.error(calibration.gemm, rows.where(held))
    assert error.mean < 0.06 and error.p95 < 0.16, error
    for m in np.unique(rows.m):  # and at every number of rows by itself
        error = gemm_fit.error(calibration.gemm, rows.where(held & (rows.m == m)))
        assert error.mean < 0.10 and error.p95 < 0.25, f"m = {m}: {error}"


@needs_anchors
def test_links_held_out_are_predicted():
    """All-to-alls of 4 GPUs from those of 2 and 8, of messages that are not small: the efficiency in the cluster files."""
    from hpcmoe.cluster.clusterfile import read_cluster
    for chip, cluster in (("h100_sxm", "dgx_h100_ndr"), ("h200_sxm", "dgx_h200_ndr")):
        rows = links_fit.read_collectives(str(ANCHORS / f"{chip}_nccl_fp16.csv"))
        rows = rows.where(rows.op == "alltoall")
        model = links_fit.fit_links(rows.where(rows.gpus != 4))
        error = links_fit.link_error(model, rows.where((rows.gpus == 4) & (rows.nbytes >= 1 << 20)))
        assert error.mean < 0.10 and error.p95 < 0.25, error
        inside = read_cluster(ROOT / "inputs" / "clusters" / f"{cluster}.toml").inside
        assert inside.efficiency * inside.rank_gb_per_s == pytest.approx(model.large_gb_per_s, rel=0.01)


# ---------------------------------------------------------------- the commands
def command(*args) -> None:
    from hpcmoe.cli import _main
    assert _main(["calibrate", *map(str, args)]) == 0


def write_table(path, rows) -> None:
    path.write_text("m,n,k,latency_ms\n" + "".join(f"{m},{n},{k},{s * 1e3!r}\n" for m, n, k, s in rows))


def test_what_fit_gemm_prints_is_a_calibration(tmp_path, capsys):
    shapes = [(m, n, k) for m in (1, 64, 300, 2000) for n in (1024, 4000, 5120) for k in (1024, 6000, 9000)]
    write_table(tmp_path / "t.csv", [(*shape, float(H100.gemm_s(*shape))) for shape in shapes])
    command("fit-gemm", tmp_path / "t.csv", "--chip", "h100_sxm", "--hold-out", "5120")
    printed = capsys.readouterr().out
    assert "fitted    24 rows" in printed and "held out  12 rows" in printed
    text = (SHIPPED / "h100_sxm.toml").read_text()
    start, end = text.index("\n[gemm]") + 1, text.index("[attention]")
    (tmp_path / "k.toml").write_text(text[:start] + printed + text[end:])
    assert read_calibration(tmp_path / "k.toml").gemm.units == 132
    command("check", tmp_path / "k.toml", "--table", tmp_path / "t.csv", "--hold-out", "5120")
    assert "m = 64      9 rows" in capsys.readouterr().out
    assert gemm_toml(H100.gemm) in text


@pytest.mark.parametrize("text, words", [
    ("m,n,latency_ms\n1,1,1\n", ["no column k"]), ("m,n,k,latency_ms\n", ["no rows"]),
    ("m,n,k,latency_ms\n1,1,1,0\n", ["line 2: latency_ms = '0'"]), ("m,n,k,latency_ms\n1,1,1,1\n1,x,1,1\n", ["line 3: n = 'x'"]), ("m,n,k,latency_ms\n1,1,1\n", ["line 2: latency_ms"]),
    ("m,n,k,latency_ms\n1,1,1,nan\n", ["latency_ms = 'nan'"])])
def test_tables_that_are_wrong_are_refused(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        gemm_fit.read_products(str(tmp_path / "t.csv"))
    assert all(word in str(caught.value) for word in ("t.csv", *words)), caught.value


def test_products_that_bench_gpu_measured(tmp_path):
    """What `hpcmoe bench gpu` writes, by its own writer, read back; and files without it."""
    from hpcmoe.bench.record import Section, write
    section = Section("gemm", "products")
    for m in (1, 16):
        section.add_point("gemm", m=m, n=64, k=96, time_ms=0.25 * m, rate_tflop_per_s=1.0)
    write(str(tmp_path / "gpu.json"), {}, [section])
    found = gemm_fit.read_products(str(tmp_path / "gpu.json"))
    assert found.m.tolist() == [1, 16] and found.n.tolist() == [64, 64] and found.k.tolist() == [96, 96]
    np.testing.assert_allclose(found.seconds, [0.25e-3, 4e-3])
    for text, words in (("{}", "no products"), ("[", "no products"), ('{"sections": {"gemm": {"points": {"gemm": [{"time_ms": 1}]}}}}', "gemm 0: m")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match=words):
            gemm_fit.read_products(str(tmp_path / "x.json"))


def test_fit_commands_refuse_what_they_cannot_do(tmp_path):
    write_table(tmp_path / "t.csv", [(1, 64, 64, 1e-6)] * 30)
    for args, words in ((["fit-gemm", tmp_path / "t.csv", "--chip", "b200"], "h100_sxm"),
                        (["fit-gemm", tmp_path / "t.csv", "--chip", "h100_sxm", "--hold-out", "64"], "too few rows"),
                        (["fit-links", tmp_path / "t.csv", "--port-gb-per-s", "450"], "no column"),
                        (["fit-links", tmp_path / "t.csv", "--port-gb-per-s", "0"], "> 0")):
        with pytest.raises(UserError, match=words):
            command(*args)


def test_measuring_this_core(tmp_path, monkeypatch, capsys):
    """Few shapes: the file can be read, names the machine and its processor, and its errors are those of its own numbers."""
    from hpcmoe.calibrate import ops
    from hpcmoe.cluster import measure
    from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
    from hpcmoe.doctor import processor
    monkeypatch.setattr(ops, "MODELS", (ModelConfig("mixtral", 64, 32, 2, AttentionConfig(2, 2, 16), RouterConfig(4, 2), ExpertConfig(24), 128),))
    monkeypatch.setattr(ops, "STEPS", ((1, 8, 1), (4, 8, 1), (2, 0, 8)))
    monkeypatch.setattr(ops, "PLAN_ROWS", (1, 2))
    monkeypatch.setattr(measure, "SHAPES", ((256, 192), (512, 512)))
    monkeypatch.setattr(measure, "HELD_OUT", ((384, 256),))
    monkeypatch.setattr(measure, "ROWS", (1, 4, 16, 64, 128))
    monkeypatch.setattr(measure, "COLD_BYTES", 1 << 20)
    monkeypatch.setattr(measure, "ATTENTION", tuple((q, start, count) for q in (1, 4) for start in (0, 200) for count in (1, 32)))
    command("measure", "--output", tmp_path / "k.toml", "--backend", "numpy", "--machine", "this one")
    made = read_calibration(tmp_path / "k.toml")
    assert made.machine == "this one" and "numpy" in made.source and made.attention.chunk_part == 1
    printed = capsys.readouterr().out
    assert "products, held out   5 rows" in printed and "attention, held out  3 rows" in printed
    assert "op expert            3 rows" in printed and "op draw              2 rows" in printed
    assert made.processor == processor() and made.calls.plan_rows == 0  # NumPy plans nothing
    assert all(0 < us < 1e5 for us in (made.calls.gate_us, made.calls.draw_us, made.calls.step_us, made.calls.op_us, made.calls.counts_us))
    x, w = np.ones((128, 512), np.float32), np.ones((512, 512), np.float32)
    took = measure.least_s(lambda: x @ w)
    assert 0.2 * took < float(made.gemm_s(128, 512, 512)) < 5 * took  # of the order of a product here


def test_what_is_measured_is_what_the_formula_counts():
    """A made-up machine that attends as the formula says: the fit finds it."""
    from hpcmoe.cluster import measure
    from hpcmoe.cluster.kernels import AttentionModel
    truth = AttentionModel(60.0, 30.0, 8.0, 2.0, 1.0, 20.0, 12.0, 0.5)
    shapes = [(q, start, count, hd) for q in (1, 4, 32) for start in (0, 300, 1000) for count in (1, 16, 256) for hd in (32, 128)]
    rows = [measure.Attended(*shape, 1.0) for shape in shapes]
    seconds = measure.attention_s(H100.gemm, truth, rows)
    found = measure.fit_attention(H100.gemm, [row._replace(seconds=float(s)) for row, s in zip(rows, seconds)])
    np.testing.assert_allclose(measure.attention_s(H100.gemm, found, rows), seconds, rtol=0.03)


def test_several_threads_are_refused(monkeypatch, tmp_path):
    from hpcmoe import linear

    class Many(type(linear.choose("numpy"))):
        def __init__(self):
            super().__init__()
            self.threads = 4

    monkeypatch.setattr(linear, "choose", lambda name, dtype: Many())
    with pytest.raises(UserError, match="4 threads.*OMP_NUM_THREADS=1"):
        command("measure", "--output", tmp_path / "k.toml")
    assert not (tmp_path / "k.toml").exists()


def test_steps_of_real_runs_on_a_gpu_are_predicted():
    """Recorded runs on an H200, to which nothing was fitted: as docs/simulate.md says."""
    from benchmarks import on_a_gpu
    ratios = np.array([said / ms for _, _, ms, said in on_a_gpu.compare()])
    assert len(ratios) == 6 and np.abs(ratios - 1).mean() < 0.16 and (0.7 < ratios).all() and (ratios < 1.3).all()
