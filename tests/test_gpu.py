"""On a real GPU: every kernel against its twin at full sizes, products, and the benchmark itself."""

import json
import subprocess
import sys

import pytest

from mpi import ROOT

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    from hpcmoe import device
    from hpcmoe.bench.bed import Bed, Options
    _, reason = device.cupy_status()
    if reason:
        pytest.skip(reason)
    return Bed(device.Gpu(0), Options(), tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_kernels_against_their_twins(bed, dtype, seed):
    from hpcmoe.bench import cases
    from hpcmoe.device import to_host
    with bed.timer.lane:
        found = [(case.name, cases.run(bed.kernels(dtype), case, bed.upload, to_host)) for case in cases.cases(dtype, seed)]
    assert [(name, fault) for name, fault in found if fault] == []


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_same_bits_every_time(bed, dtype):
    """No kernel's result depends on the order in which blocks run."""
    from hpcmoe.bench import cases
    from hpcmoe.device import to_host

    def results():
        made = []
        for case in cases.cases(dtype, 1):
            there = cases.map_arrays(case.args, bed.upload)
            case.launch(bed.kernels(dtype), *there.values(), **cases.map_arrays(case.options, bed.upload))
            made.append((case.name, {name: to_host(there[name]).tobytes() for name in case.out}))
        return made

    with bed.timer.lane:
        first = results()
        assert [name for (name, a), (_, b) in zip(first, results()) if a != b] == []


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_products(bed, dtype):
    from hpcmoe.bench import correct
    from hpcmoe.kernels.loader import T_DTYPE
    import numpy as np
    with bed.timer.lane:
        for shape in correct.PRODUCTS:
            for out in (T_DTYPE[dtype], np.dtype(np.float32)):
                assert correct.product(bed, dtype, shape, out) == ""


def test_bench_gpu(bed, tmp_path):
    """The command at its full sizes, without what starts other programs."""
    out = tmp_path / "gpu.json"
    bed.release()
    command = [sys.executable, "-m", "hpcmoe", "bench", "gpu", "--out", str(out), "--only", "correct,expert,wide,several,kernels,gemm"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["measured"] and found["scale"] == "full" and found["device"]["clocks_before"]
    assert all(section["status"] == "done" for section in found["sections"].values())
    for row in found["sections"]["kernels"]["points"]["kernels"]:
        assert 0 < row["share_of_copy"] < 3, row  # more than 1 only where a cache helps
