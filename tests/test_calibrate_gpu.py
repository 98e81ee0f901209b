"""`hpcmoe calibrate measure --gpu` on the CuPy look-alike, and fits of what a made-up GPU measured."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from cudabed import bed
from hpcmoe.cluster import gpu_fit
from hpcmoe.cluster.kernels import SHIPPED, AttentionModel, ElementwiseModel, read_calibration
from hpcmoe.errors import UserError
from mpi import ROOT, environment
from test_bench import assert_complete

H200 = read_calibration(SHIPPED / "h200_sxm.toml")
TRUTH = replace(H200, attention=AttentionModel(300e3, 300e3, 4200.0, 0.0, 0.5, 4.0, 0.5, 0.01, 120.0, 15.0), elementwise=ElementwiseModel(3840.0, 3.0))
PROGRAM = """import sys
from hpcmoe.bench import calibrate
def broken(bed, section, deadline):
    raise ValueError("out of order")
calibrate.ITEMS = tuple(item._replace(measure=broken) if item.name == "attention, prefill" else item for item in calibrate.ITEMS)
from hpcmoe import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(bool(bed.missing()), reason=bed.missing() or "-")
def test_measuring_goes_on_where_one_item_fails(tmp_path):
    """Exit code 1, the item and what hangs on it are named, all else is there; the fit can be made again from what was kept."""
    program, out, raw = tmp_path / "broken.py", tmp_path / "k.toml", tmp_path / "raw.json"
    program.write_text(PROGRAM)
    env = environment(bed.lookalike_env(FAKECUDA_TOTAL_MIB="768"))
    env["PYTHONPATH"] = f"{ROOT}:{env['PYTHONPATH']}"
    base = SHIPPED / "h200_sxm.toml"
    done = subprocess.run([sys.executable, str(program), "calibrate", "measure", "--gpu", "--scale", "small", "--out", str(out), "--raw", str(raw),
                           "--base", str(base)], capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "calibrate: attention, prefill: not measured: ValueError: out of order" in done.stderr and "NOT A MEASUREMENT" in done.stdout
    found = json.loads(raw.read_text())
    section = found["sections"]["calibrate"]
    assert section["status"] == "failed" and section["points"]["not_measured"] == [{"item": "attention, prefill", "why": "ValueError: out of order"}]
    section["status"] = "done"
    del section["points"]["not_measured"]
    assert_complete(found, ["calibrate"])
    assert set(section["points"]) == {"launch", "graph", "sync", "pinned", "pass", "decode", "gemm", "engine"}
    assert {point["call"] for point in section["points"]["launch"]} == {"kernel", "product", "copy", "event"}
    with_graphs, without = section["points"]["engine"]
    assert with_graphs["graph_replays"] > 0 and without["graph_replays"] == 0 and without["kernels"] > with_graphs["kernels"]
    made = read_calibration(out)
    assert made.attention == H200.attention and made.gemm.units == found["device"]["multiprocessors"] and "look-alike" in made.machine
    assert f"# [attention] was not measured: numbers of {base}" in out.read_text()
    again = subprocess.run([sys.executable, "-m", "hpcmoe", "calibrate", "fit-gpu", str(raw), "--output", str(tmp_path / "again.toml"), "--base", str(base)],
                           capture_output=True, text=True, cwd=ROOT, env=environment())
    assert again.returncode == 1 and (tmp_path / "again.toml").read_text() == out.read_text(), again.stderr


def made_up(tmp_path, name: str = "NVIDIA H200", leave_out: tuple[str, ...] = ()):
    """A file of measurements of a GPU that behaves as TRUTH says, with an engine, copies and launches known in closed form."""
    heads = {"heads": 32, "kv_heads": 8, "head_dim": 128}
    shapes = [(m, n, k) for m in (1, 16, 128, 1024, 4096) for n in (1024, 4096, 16384) for k in (2048, 8192, 5120)]
    decode = [(q, p) for q in (1, 8, 64, 256) for p in (128, 512, 2048, 8192)]
    prefill = [(q, p) for q in (1, 4, 16) for p in (128, 512, 2048, 8192)]
    passed = [2**i for i in range(12, 30, 2)]
    points = {
        "gemm": [{"m": m, "n": n, "k": k, "time_ms": 1e3 * float(TRUTH.gemm_s(m, n, k))} for m, n, k in shapes],
        "decode": [heads | {"sequences": q, "context": p, "time_us": 1e6 * float(TRUTH.decode_s(q * p, q, 32, 8, 128))} for q, p in decode],
        "prefill": [heads | {"sequences": q, "length": p, "time_us": 1e6 * TRUTH.prefill_s(np.zeros(q), np.full(q, p), 32, 8, 128)}
                    for q, p in prefill],
        "pass": [{"kernel": "norm", "moved_bytes": n, "time_us": 1e6 * float(TRUTH.elementwise_s(n))} for n in passed],
        "launch": [{"call": name, "host_us": us} for name, us in (("kernel", 6.0), ("product", 4.0), ("copy", 2.0), ("event", 1.0))],
        "graph": [{"nodes": n, "host_us": 5.0 + n, "device_us": 2.0 * n} for n in (1, 5, 20)],
        "sync": [{"how": "poll", "host_us": 7.5}, {"how": "wait", "host_us": 15.0}],
        "pinned": [{"way": way, "copied_bytes": n, "time_us": 3.0 + n / rate} for way, rate in (("to host", 50e3), ("to device", 25e3))
                   for n in passed],
        "engine": [{"graphs": 1, "ops": 1000, "busy_s": 1e-6 * (1000 * 20 + 5 * 300 + 10 * 400), "kernels": 200, "products": 100, "graph_replays": 400},
                   {"graphs": 0, "ops": 1000, "busy_s": 1e-6 * (1000 * 22 + 5 * 3000), "kernels": 2000, "products": 1000, "graph_replays": 0}]}
    for curve in leave_out:
        del points[curve]
    path = tmp_path / "raw.json"
    path.write_text(json.dumps({"date_utc": "2026-01-01", "dtype": "bf16", "scale": "full", "measured": True,
                                "device": {"name": name, "multiprocessors": 132, "clocks_before": {"driver_version": "580.1"}},
                                "sections": {"calibrate": {"figures": {"copy_gb_per_s": 4000.0}, "points": points}}}))
    return path


def test_a_fit_finds_the_gpu_that_measured(tmp_path):
    found = gpu_fit.fit_gpu(gpu_fit.read_raw(str(made_up(tmp_path))))
    assert not found.missing and found.machine == "NVIDIA H200" and "driver 580.1" in found.source
    assert set(found.errors) >= {"products, held out", "decode attention, held out", "prefill attention, held out"}
    assert all(error.mean < 0.04 for error in found.errors.values()), found.errors
    (tmp_path / "k.toml").write_text(found.toml(None, ""))
    made = read_calibration(tmp_path / "k.toml")
    assert made.elementwise.gb_per_s == pytest.approx(3840, rel=1e-3) and made.elementwise.floor_us == pytest.approx(3.0, rel=1e-3)
    assert made.host.launch_us == 5.0 and made.host.sync_us == 7.5 and made.host.graph_us == 10.0 and made.calls.op_us == pytest.approx(21.0)
    assert (made.copies.to_host_gb_per_s, made.copies.to_device_gb_per_s) == pytest.approx((50, 25), rel=1e-3)
    assert made.copies.floor_us == pytest.approx(3.0, rel=1e-2)
    assert made.attention.prefill_gflop_per_s == pytest.approx(300e3, rel=0.02) and made.attention.kv_gb_per_s == pytest.approx(4200, rel=0.02)
    assert made.attention.extra_keys == pytest.approx(120, rel=0.1) and made.attention.ramp_us == pytest.approx(15, rel=0.1)


def test_an_unknown_gpu_has_peaks_from_what_it_reached(tmp_path):
    raw = gpu_fit.read_raw(str(made_up(tmp_path, "NVIDIA X1")))
    m, n, k, ms = raw.columns("gemm", "m", "n", "k", "time_ms")
    rows = gpu_fit.Products(m, n, k, ms * 1e-3)
    chip = gpu_fit.chip_of(raw, rows)
    assert chip.gflop_per_s == pytest.approx(1.25 * (2e-6 * m * n * k / ms).max()) and chip.memory_gb_per_s == 5000 and chip.units == 132
    assert gpu_fit.chip_of(gpu_fit.read_raw(str(made_up(tmp_path, "NVIDIA H100 80GB HBM3"))), rows) is gpu_fit.CHIPS["h100_sxm"]


def test_what_was_not_measured_is_named_and_never_made_up(tmp_path):
    found = gpu_fit.fit_gpu(gpu_fit.read_raw(str(made_up(tmp_path, leave_out=("gemm", "graph")))))
    assert set(found.missing) == {"gemm", "attention", "host", "calls"} and "'graph'" in found.missing["host"]
    text = found.toml(None, "")
    assert "[gemm] was not measured: left out" in text and "launch_us" not in text
    (tmp_path / "k.toml").write_text(text)
    with pytest.raises(UserError, match="gemm is missing"):
        read_calibration(tmp_path / "k.toml")
    (tmp_path / "k.toml").write_text(found.toml(H200, "h200.toml"))
    made = read_calibration(tmp_path / "k.toml")
    assert (made.gemm, made.attention) == (H200.gemm, H200.attention) and made.copies is not None


@pytest.mark.parametrize("text, words", [("{", "no measurements of a GPU"), ('{"sections": {}}', "no measurements of a GPU"), (None, "cannot be read")])
def test_other_files_are_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "raw.json").write_text(text)
    with pytest.raises(UserError, match=words):
        gpu_fit.read_raw(str(tmp_path / "raw.json"))


def test_options_that_do_not_go_together_are_refused(tmp_path):
    from hpcmoe.cli import _main
    for args, words in ((["--raw", "x.json"], "for --gpu"), (["--gpu", "--backend", "numpy"], "cuBLAS"), (["--gpu", "--dtype", "fp32"], "cuBLAS")):
        with pytest.raises(UserError, match=words):
            _main(["calibrate", "measure", "--output", str(tmp_path / "k.toml"), *args])
    assert not list(tmp_path.iterdir())


def test_the_shipped_numbers_are_those_of_the_h200_that_was_measured():
    """Its measurements come with the project: the fit's errors, and the file's attention and passes."""
    found = gpu_fit.fit_gpu(gpu_fit.read_raw(str(ROOT / "docs" / "measurements" / "h200_calibrate.json")))
    assert not found.missing and found.machine == "NVIDIA H200"
    assert found.errors["products, held out"].mean < 0.08 and found.errors["decode attention, held out"].mean < 0.18
    for part, names in (("attention", ("prefill_gflop_per_s", "kv_gb_per_s", "floor_us", "extra_keys", "ramp_us")), ("elementwise", ("gb_per_s", "floor_us")),
                        ("copies", ("to_host_gb_per_s", "to_device_gb_per_s", "floor_us"))):
        for name in names:
            assert getattr(getattr(H200, part), name) == pytest.approx(getattr(found.parts[part], name), rel=0.02), f"{part}.{name}"
