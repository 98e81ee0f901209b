"""`hpcmoe bench gpu` without a GPU: on the CuPy look-alike at tiny sizes; its arithmetic, its record, its refusals."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from cudabed import bed
from hpcmoe.bench import anchors, cases, record, timing
from mpi import ROOT, environment

UNITS = ("_ms", "_us", "_s", "_gb_per_s", "_tflop_per_s", "_tokens_per_s", "_bytes")
PLAIN = ("share", "ratio", "error", "share_of_copy", "cases", "per_layer_and_step", "_without_graphs", "products_or_attention")
COUNTS = {"rows", "m", "n", "k", "kernel", "shape", "sequences", "tokens", "against", "positions", "ranks", "transport",
          "experts", "deal", "way", "call", "how", "nodes", "heads", "kv_heads", "head_dim", "context", "length", "graphs", "layers", "steps", "ops",
          "kernels", "products", "graph_replays"}
lookalike = pytest.mark.skipif(bool(bed.missing()), reason=bed.missing() or "-")


def bench(tmp_path, *arguments, env=None, timeout=400):
    """(finished process, content of the JSON file or None)."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "hpcmoe", "bench", "gpu", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(env), timeout=timeout)
    return done, json.loads(out.read_text()) if out.exists() else None


def small(tmp_path, only: str, **more):
    done, found = bench(tmp_path, "--scale", "small", "--only", only, "--budget", "3000", env=bed.lookalike_env(FAKECUDA_TOTAL_MIB="768", **more))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done, found


def assert_complete(found, names: list[str]) -> None:
    """Head and sections are there, nothing failed, and every figure's name ends in its unit."""
    assert (found["format"], found["format_version"], found["scale"]) == ("hpcmoe-bench-gpu", 1, "small")
    assert found["measured"] is False and "look-alike" in found["device"]["name"]  # never to be taken for a measurement
    assert found["date_utc"].endswith("+00:00") and found["elapsed_s"] > 0
    assert {"name", "compute_capability", "cuda_runtime", "cuda_of_driver", "cupy", "clocks_before"} <= set(found["device"])
    assert list(found["sections"]) == names
    for name, section in found["sections"].items():
        assert section["status"] in ("done", "skipped"), (name, section["error"])
        figures = [section["figures"], *(point for points in section["points"].values() for point in points)]
        for key, value in ((key, value) for part in figures for key, value in part.items()):
            assert key in COUNTS or key.endswith(UNITS) or key.endswith(PLAIN), f"{name}: {key}"
            assert isinstance(value, (int, float, str)), f"{name}: {key} = {value!r}"


# ---------------------------------------------------------------- the command
@lookalike
def test_kernels_and_products_on_the_lookalike(tmp_path):
    done, found = small(tmp_path, "correct,expert,wide,several,kernels,gemm,exchange")
    assert_complete(found, ["correct", "expert", "wide", "several", "kernels", "gemm", "exchange"])
    sections = found["sections"]
    assert sections["correct"]["figures"]["cases"] > 50 and sections["correct"]["figures"]["failed_cases"] == 0
    assert [point["rows"] for point in sections["expert"]["points"]["expert"]] == [4, 64]
    assert {point["way"] for point in sections["several"]["points"]["several"] if point["experts"] == 8} == {
        "one stream", "2 streams", "4 streams", "grouped GEMM"}
    timed = {point["kernel"].split()[0] for point in sections["kernels"]["points"]["kernels"]}
    assert timed == {"norm", "permute", "unpack", "merge", "gather", "scatter", "router", "rope", "swiglu", "embed", "decode",
                     "prefill", "sample"}
    assert len([g for g in sections["kernels"]["goals"] if g["met"] is not None]) == 7
    assert sections["exchange"]["status"] == "skipped" and "--mpiexec" in sections["exchange"]["error"]
    assert "NOT A MEASUREMENT" in done.stdout and "goal" in done.stdout and "correct: failed" not in done.stderr


@lookalike
def test_jobs_on_the_lookalike(tmp_path):
    done, found = small(tmp_path, "layer,model,stack,peers")
    assert_complete(found, ["layer", "model", "stack", "peers"])
    sections = found["sections"]
    (layer,) = sections["layer"]["points"]["layers"]
    assert layer["shape"] == "tiny" and layer["graph_replays_per_layer_and_step_without_graphs"] == 0 < layer["products_per_layer_and_step"]
    against = {goal["what"]: goal for goal in sections["model"]["goals"]}
    assert against["same greedy tokens as NumPy"]["met"] and against["log-probabilities, relative error to NumPy"]["met"]
    assert sections["stack"]["points"]["stacks"][0]["decode_tokens_per_s"] > 0
    if importlib.util.find_spec("torch") is None:
        assert all(goal["met"] is None and "not installed" in goal["why"] for goal in sections["peers"]["goals"])


def test_no_gpu_is_one_clear_error(tmp_path):
    if importlib.util.find_spec("cupy"):
        pytest.skip("this environment has CuPy")
    done, found = bench(tmp_path)
    assert done.returncode == 2 and found is None and done.stdout == ""
    assert done.stderr.strip().startswith("hpcmoe: bench gpu: no GPU can be used: CuPy does not import")
    assert len(done.stderr.strip().splitlines()) == 1


def test_unknown_section(tmp_path):
    done, _ = bench(tmp_path, "--only", "correct,kernel")
    assert done.returncode == 2 and "'kernel': expected some of correct, expert" in done.stderr


@lookalike
def test_a_wrong_kernel_fails_the_run(tmp_path):
    """The same command with a norm that is a little wrong: exit code 1, the case is named, the rest goes on."""
    program = tmp_path / "wrong.py"
    program.write_text("import sys\nfrom hpcmoe.kernels import norm\n"
                       "right = norm.norm_twin\n"
                       "def wrong(*args, **options):\n    right(*args, **{**options, 'eps': options['eps'] + 0.05})\n"
                       "norm.norm_twin = wrong\n"
                       "from hpcmoe import cli\nsys.exit(cli.main(sys.argv[1:]))\n")
    out = tmp_path / "gpu.json"
    env = environment(bed.lookalike_env(FAKECUDA_TOTAL_MIB="768"))
    env["PYTHONPATH"] = f"{ROOT}:{env['PYTHONPATH']}"
    done = subprocess.run([sys.executable, str(program), "bench", "gpu", "--out", str(out), "--scale", "small", "--budget", "3000",
                           "--only", "correct,gemm"], capture_output=True, text=True, env=env, timeout=400)
    found = json.loads(out.read_text())["sections"]
    assert done.returncode == 1, done.stderr[-3000:]
    assert found["correct"]["status"] == "failed" and "norm rms 1 x 8" in found["correct"]["error"]
    assert found["gemm"]["status"] == "done"


# ---------------------------------------------------------------- comparing
def test_differ_sees_one_ulp_too_many():
    want = np.array([1.0, 2.0, 0.0, np.inf, np.nan], np.float16)
    assert cases.differ("x", want.copy(), want, "fp16", cases.EXACT) == ""
    near = want.copy()
    near[1] += np.float16(2 * 2.0**-10)
    assert cases.differ("x", near, want, "fp16", cases.ULP["fp16"]) == ""
    assert "x: 1 of 5" in cases.differ("x", near, want, "fp16", cases.EXACT)
    near[1] += np.float16(2 * 2.0**-10)
    assert "at [1]" in cases.differ("x", near, want, "fp16", cases.ULP["fp16"])
    for at, wrong in ((3, -np.inf), (3, 1.0), (4, 0.0), (0, np.nan)):
        other = want.copy()
        other[at] = wrong
        assert f"at [{at}]" in cases.differ("x", other, want, "fp16", cases.ULP["fp16"]), (at, wrong)


def test_differ_reads_bf16_bits():
    want = np.array([0x3F80, 0x4000], np.uint16)  # 1, 2
    assert cases.differ("x", np.array([0x3F81, 0x4000], np.uint16), want, "bf16", cases.ULP["bf16"]) == ""
    assert cases.differ("x", np.array([0x3F83, 0x4000], np.uint16), want, "bf16", cases.ULP["bf16"]) != ""


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_twin_agrees_with_itself_and_writes_its_outputs(dtype):
    """Each case's outputs change when its twin runs: a case cannot pass because nothing was compared."""
    for case in cases.cases(dtype, small=True):
        before = cases.map_arrays(case.args, np.copy)
        after = cases.map_arrays(case.args, np.copy)
        case.twin(*after.values(), **cases.map_arrays(case.options, np.copy))
        for name in case.out:
            assert before[name].tobytes() != after[name].tobytes(), (case.name, name)


# ---------------------------------------------------------------- time and record
class Clock:
    """A device on which a call takes 3 ms and a graph 1 ms of overhead."""

    def __init__(self):
        self.now = 0.0

    def lane(self, products=False):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None

    def capture(self, func):
        before = self.now
        func()
        took, self.now = self.now - before + 1e-3, before
        return type("Graph", (), {"launch": lambda _: setattr(self, "now", self.now + took)})()

    def event(self, timing=False):
        clock = self

        class Event:
            def record(self):
                self.at = clock.now
                return self

            def wait(self):
                return None
        return Event()

    def elapsed_s(self, a, b):
        return b.at - a.at


@pytest.mark.parametrize("graphs, want", [(True, 3 + 1 / 4), (False, 3.0)])
def test_time_is_that_of_one_call(graphs, want):
    clock = Clock()
    timed = timing.Timer(clock, graphs=graphs)([lambda: setattr(clock, "now", clock.now + 3e-3)] * 4)
    assert timed.ms == pytest.approx(want) and timed.least_ms == pytest.approx(want) and 7 <= timed.repetitions <= 50


def test_rings_are_larger_than_caches():
    for nbytes in (1, 4096, 10 << 20, 100 << 20, 250 << 20, 2 << 30):
        count = timing.ring(nbytes)
        assert 2 <= count <= timing.RING_MOST and (count * nbytes >= timing.RING_BYTES or count == timing.RING_MOST)


def test_record_and_table(tmp_path):
    section = record.Section("kernels", figures={"copy_gb_per_s": np.float64(3000.0), "odd_ms": float("inf")})
    section.goal("a", ">=", 0.8, 0.9)
    section.goal("b", "<=", 15.0, 15.1)
    section.goal("c", ">=", 2.0, None, "PyTorch is not installed")
    section.add_point("kernels", kernel="norm", time_us=np.float32(1.5))
    head = {"device": {"name": "GPU"}, "measured": True, "scale": "full", "elapsed_s": 1.0}
    record.write(str(tmp_path / "x" / "gpu.json"), head, [section])
    found = json.loads((tmp_path / "x" / "gpu.json").read_text())["sections"]["kernels"]
    assert [goal["met"] for goal in found["goals"]] == [True, False, None]
    assert found["figures"] == {"copy_gb_per_s": 3000.0, "odd_ms": "inf"}
    lines = record.table(head, [section]).splitlines()
    assert any("kernels: b" in line and "15.10" in line and line.endswith("NO") for line in lines)
    assert any("not measured  PyTorch is not installed" in line for line in lines)
    assert not any("NOT A MEASUREMENT" in line for line in lines)


def test_public_figures_are_for_their_gpu_only():
    assert anchors.expert("NVIDIA H200", 64) == pytest.approx({"public_pair_ms": 0.0762800, "public_fused_moe_ms": 0.717856})
    assert anchors.expert("NVIDIA H100 80GB HBM3", 1024) == pytest.approx({"public_pair_ms": 0.310176})
    assert anchors.expert("NVIDIA H100 PCIe", 64) == {} and anchors.expert("CuPy look-alike", 64) == {}


# ---------------------------------------------------------------- the others
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize("job", [
    {"what": "experts", "d": 32, "f": 48, "rows": [3], "dtype": "bf16", "seconds": 0.01},
    {"what": "stack", "dtype": "bf16", "sequences": 2, "prompt_tokens": 4, "steps": 2, "implementations": ["eager"], "seconds": 30,
     "model": {"vocab": 50, "d": 32, "f": 48, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "experts": 4, "top_k": 1,
               "norm_eps": 1e-5, "context": 64, "window": 0, "tied": False, "theta": 1e4, "dtype": "bf16"}}])
def test_peers(job):
    done = subprocess.run([sys.executable, str(ROOT / "hpcmoe/bench/peers.py")], input=json.dumps(job), capture_output=True, text=True,
                          timeout=400)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["torch"]
    if job["what"] == "experts":
        assert found["points"][0]["torch_bmm_ms"] > 0
    elif found["transformers"]:
        assert found["decode"]["eager"] > 0 and found["prefill"]["eager"] > 0
