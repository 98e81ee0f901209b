"""The CuPy look-alike in the process of the tests: fixtures that test files import."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from . import bed

needs_lookalike = pytest.mark.skipif(bool(bed.missing()), reason=bed.missing() or "here")

KERNELS = """
extern "C" __global__ void add(int *y, const int *x, int a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] + a;
}
extern "C" __global__ void reverse(int *y, int n) {
    CUDACPU_DYNAMIC_SHARED(int, all);
    for (int i = threadIdx.x; i < n; i += blockDim.x) all[i] = y[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = all[n - 1 - i];
}
"""


@pytest.fixture(scope="module")
def cp():
    """The look-alike as `cupy`, in this process; gone when the module's tests are over."""
    with pytest.MonkeyPatch.context() as patch:
        hidden = [name for name in sys.modules if name.split(".")[0] == "cupy"]
        for name in hidden:
            patch.delitem(sys.modules, name)
        env = bed.lookalike_env(FAKECUDA_TOTAL_MIB="256")
        for name in ("LOOKALIKE_SEED", "LOOKALIKE_EAGER", "LOOKALIKE_SMS", "FAKECUDA_DEVICES", "CUDA_VISIBLE_DEVICES"):
            patch.delenv(name, raising=False)
        patch.setenv("FAKECUDA_TOTAL_MIB", env["FAKECUDA_TOTAL_MIB"])
        patch.setenv("FAKECUDA_LIBRARY", env["FAKECUDA_LIBRARY"])
        patch.syspath_prepend(env["PYTHONPATH"].split(":")[0])
        import cupy
        assert cupy.__version__.endswith("lookalike")
        cupy.cuda.runtime.setDevice(0)
        yield cupy
        for name in [name for name in sys.modules if name.split(".")[0] == "cupy"]:
            del sys.modules[name]


@pytest.fixture
def stream(cp):
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        yield stream
    cp.cuda.runtime.deviceSynchronize()


@pytest.fixture(scope="module")
def kernels(cp):
    module = cp.RawModule(code=KERNELS, options=("-std=c++17",), backend="nvrtc")
    return {name: module.get_function(name) for name in ("add", "reverse")}


@pytest.fixture
def add(kernels):
    """add(y, x, a): y = x + a, queued on the current stream."""
    return lambda y, x, a: kernels["add"]((1,), (32,), (y, x, np.int32(a), np.int32(x.size)))


def numbers(n: int = 8) -> np.ndarray:
    return np.arange(n, dtype=np.int32)


def peek(array) -> np.ndarray:
    """What is in device memory now, without waiting for anything."""
    return array._host.copy()


def outside(code: str, **env) -> subprocess.CompletedProcess:
    """Runs code in a Python of its own that has the look-alike."""
    return subprocess.run([sys.executable, "-c", code], env=os.environ | bed.lookalike_env(**env), capture_output=True, text=True)
