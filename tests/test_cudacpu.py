"""What the kernels' tests rest on: wrong kernels are found out, and the tests also run under AddressSanitizer."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hpcmoe.kernels import loader
from tests.cudabed.check import needs_compiler
from tests.cudabed.cudacpu import Module

ROOT = Path(__file__).resolve().parent.parent
pytestmark = needs_compiler

CODE = """
#ifndef CUDACPU
#define CUDACPU_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif
// y[i] = x[i + 1]: reads one element beyond x where n is the length of both
extern "C" __global__ void shifted(const float *x, float *y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i + 1];
}
extern "C" __global__ void filled(float *y, int n) {  // one thread too many writes
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= n) y[i] = 1.f;
}
extern "C" __global__ void beyond_dynamic(float *y, int n) {
    CUDACPU_DYNAMIC_SHARED(float, s);
    s[threadIdx.x + n] = 1.f;
    y[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void beyond_fixed(float *y, int n) {
    __shared__ float s[8];
    s[threadIdx.x + n] = 1.f;
    y[threadIdx.x] = s[threadIdx.x];
}
template <bool WAITS> __device__ void running_sum(const int *x, int *y) {
    CUDACPU_DYNAMIC_SHARED(int, s);
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    for (int d = 1; d < int(blockDim.x); d *= 2) {
        const int left = int(threadIdx.x) >= d ? s[threadIdx.x - d] : 0;
        if (WAITS) __syncthreads();  // or some add what others have added already
        s[threadIdx.x] += left;
        __syncthreads();
    }
    y[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void sums(const int *x, int *y) { running_sum<true>(x, y); }
extern "C" __global__ void racing_sums(const int *x, int *y) { running_sum<false>(x, y); }
extern "C" __global__ void halves(int *y) {  // half of a warp at one barrier, half at another
    if (threadIdx.x < 16) __syncthreads();
    else __syncwarp();
    y[threadIdx.x] = 1;
}
extern "C" __global__ void lanes(int *y) { y[threadIdx.x] = __shfl_sync(threadIdx.x < 16 ? 0x0000ffffu : 0xffffffffu, int(threadIdx.x), 0); }
extern "C" __global__ void copied(const uint4 *x, uint4 *y) { y[threadIdx.x] = x[threadIdx.x]; }
"""


def alone(body: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs lines of Python, with `call(kernel, block, *arguments)` at hand, in a process that may die of them."""
    code = (f"import numpy as np\nfrom tests.test_cudacpu import CODE, Module\n"
            f"def call(kernel, block, *a, shared=0): Module(CODE).get_function(kernel)((1,), (block,), a, shared_mem=shared)\n{body}")
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True,
                          text=True, check=False, timeout=300)


# ---- order of threads, barriers, alignment
def outcomes(monkeypatch, kernel: str) -> set:
    found = set()
    x, y = np.arange(1, 97, dtype=np.int32), np.zeros(96, np.int32)
    for seed in range(6):
        monkeypatch.setenv("CUDACPU_SEED", str(seed))
        Module(CODE).get_function(kernel)((1,), (96,), (x, y), shared_mem=96 * 4)
        found.add(tuple(y.tolist()))
    return found


def test_a_missing_barrier_shows_in_the_order_of_threads(monkeypatch):
    assert outcomes(monkeypatch, "sums") == {tuple(np.cumsum(np.arange(1, 97)).tolist())}
    assert len(outcomes(monkeypatch, "racing_sums")) > 1


def test_a_barrier_that_not_all_threads_reach_is_reported():
    done = alone("call('halves', 64, np.zeros(64, np.int32))")
    assert done.returncode != 0 and "deadlock" in done.stderr


def test_lanes_that_name_different_masks_are_reported():
    done = alone("call('lanes', 32, np.zeros(32, np.int32))")
    assert done.returncode != 0 and "warp primitive names a lane that has returned" in done.stderr


@pytest.mark.parametrize("offset", [0, 4, 8])
def test_sixteen_bytes_at_an_address_that_is_no_multiple_of_16_are_reported(offset):
    done = alone(f"b = np.zeros(2048, np.uint8)[:1600]; o = -b.ctypes.data % 16\n"
                 f"call('copied', 32, b[o + {offset}:], b[o + 1024:])")
    assert (done.returncode != 0) == (offset != 0) and ("misaligned" in done.stderr) == (offset != 0)


@pytest.mark.parametrize("arguments, said", [
    ("np.zeros(8, np.float32)", "takes 2 arguments"), ("np.zeros(8, np.float32), np.int64(3)", "8 bytes, the kernel takes 4"),
    ("np.zeros(8, np.float32), 3", "argument 1 is a <class 'int'>")])
def test_arguments_of_other_sizes_are_refused(arguments, said):
    done = alone(f"call('filled', 8, {arguments})")
    assert done.returncode != 0 and said in done.stderr


# ---- AddressSanitizer
def sanitizer() -> str:
    """The library to preload, "" if the compiler has none."""
    found = subprocess.run([os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"], capture_output=True, text=True,
                           check=False).stdout.strip()
    return found if os.path.isabs(found) and os.path.exists(found) else ""


@pytest.fixture(scope="module")
def checked() -> dict:
    """The environment in which a bad access ends the process."""
    if not sanitizer():
        pytest.skip("the compiler has no AddressSanitizer")
    return {"CUDACPU_ASAN": "1", "LD_PRELOAD": sanitizer(), "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0"}


Y = "np.zeros(8, np.float32)"


@pytest.mark.parametrize("call, said", [
    (f"'shifted', 8, {Y}, {Y}, np.int32(8)", "heap-buffer-overflow.*READ of size 4"),
    (f"'filled', 32, {Y}, np.int32(8)", "heap-buffer-overflow.*WRITE of size 4"),
    (f"'beyond_dynamic', 8, {Y}, np.int32(1), shared=32", "heap-buffer-overflow.*WRITE of size 4"),
    (f"'beyond_fixed', 8, {Y}, np.int32(1)", "out of bounds")])
def test_an_access_beyond_an_array_ends_the_process(checked, call, said):
    done = alone(f"call({call})", **checked)
    assert done.returncode != 0 and re.search(said, done.stderr, re.S), done.stderr


@pytest.mark.parametrize("call", [
    f"'shifted', 8, {Y}, {Y}, np.int32(7)", f"'filled', 32, {Y}, np.int32(7)",
    f"'beyond_dynamic', 8, {Y}, np.int32(0), shared=32", f"'beyond_fixed', 8, {Y}, np.int32(0)"])
def test_an_access_within_an_array_does_not(checked, call):
    done = alone(f"call({call})", **checked)
    assert done.returncode == 0, done.stderr


BUILD = ("import sys; from hpcmoe.kernels import loader; from tests.cudabed.cudacpu import Module\n"
         "Module(loader.source(sys.argv[1]), loader.options('fp16'))")


FILES = sorted(p.name for p in Path(__file__).parent.glob("test_kernels_*.py") if p.name != "test_kernels_compile.py")


@pytest.fixture(scope="module")
def runs(checked, request) -> dict:
    """File -> its tests' run to come, all cores at work; first all kernels are built, in one of the two types."""
    environment = {**os.environ, **checked, "CUDACPU_DTYPES": "fp16"}
    pytest_options = ["-q", "-x", "-s", "-p", "no:cacheprovider", "-p", "tests.cudabed.sparse",
                      "-k", "not large and not many_draws and not frequencies"]

    def build(name: str) -> None:
        subprocess.run([sys.executable, "-c", BUILD, name], cwd=ROOT, env=environment, check=True)

    def run(file: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "pytest", *pytest_options, "tests/" + file], cwd=ROOT, env=environment,
                              capture_output=True, text=True, check=False)
    chosen = {item.callspec.params["file"] for item in request.session.items if "runs" in item.fixturenames}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, loader.names()))
        yield {file: pool.submit(run, file) for file in FILES if file in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("file", FILES)
def test_the_kernels_touch_nothing_beyond_their_arrays(runs, file):
    done = runs[file].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 3
