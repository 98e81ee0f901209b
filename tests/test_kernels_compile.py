"""Every kernel compiles with NVIDIA's compilers, without a warning and without a spill; a table says what it takes."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from hpcmoe.kernels import loader
from tests.cudabed import compile as cuda

DTYPES = ("fp16", "bf16")
TYPED = re.compile(r"\bT\b|\bto_t\b|\bto_float\b|\bEight\b|\bHM_BF16\b")
needs_nvcc = pytest.mark.skipif(bool(cuda.nvcc_missing()), reason=cuda.nvcc_missing() or "-")
needs_nvrtc = pytest.mark.skipif(bool(cuda.nvrtc_missing()), reason=cuda.nvrtc_missing() or "-")


def typed(name: str) -> bool:
    """Whether a file depends on the 16-bit type at all."""
    return bool(TYPED.search(loader.source(name).replace((loader.HERE / "common.cuh").read_text().replace("#pragma once\n", ""), "")))


ALL = [(name, dtype) for name in loader.names() for dtype in (DTYPES if typed(name) else DTYPES[:1])]


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory):
    """(file, type) -> what nvcc will have said, all cores at work; prints the table at the end."""
    folder, architectures = tmp_path_factory.mktemp("nvcc"), cuda.known_architectures()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {(name, dtype): pool.submit(cuda.by_nvcc, loader.source(name), loader.options(dtype), architectures,
                                          folder / name / dtype) for name, dtype in ALL}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def printed(request):
    """Collects what kernels take; the table reaches the terminal whether pytest captures output or not."""
    by_type: dict = {dtype: [] for dtype in DTYPES}
    yield by_type
    reporter, capture = (request.config.pluginmanager.get_plugin(p) for p in ("terminalreporter", "capturemanager"))
    with capture.global_and_fixture_disabled():
        reporter.write("\n" + "\n".join(cuda.table(by_type)) + "\n")


@needs_nvcc
@pytest.mark.parametrize("name, dtype", ALL)
def test_nvcc_has_no_complaint_and_spills_nothing(nvcc, printed, name, dtype):
    found = nvcc[name, dtype].result()
    printed[dtype] += found
    kernels = set(re.findall(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)', loader.source(name)))
    assert kernels and {(u.kernel, u.architecture) for u in found} == {(k, a) for k in kernels for a in cuda.known_architectures()}
    assert [u for u in found if u.spilled] == []


@pytest.fixture(scope="module")
def nvrtc():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {(name, dtype): pool.submit(cuda.by_nvrtc, loader.source(name), loader.options(dtype), "sm_90")
               for name, dtype in ALL}
        pool.shutdown(cancel_futures=True)


@needs_nvrtc
@pytest.mark.parametrize("name, dtype", ALL)
def test_nvrtc_compiles(nvrtc, name, dtype):
    nvrtc[name, dtype].result()


# ---- the checks can fail
BARE = 'extern "C" __global__ void k(float *x, int n) {{ {} }}\n'
UNUSED = BARE.format("int unused = n; x[0] = 1.f;")
WRONG = BARE.format("x[0] = nothing_of_that_name;")
SPILLS = """extern "C" __global__ void __launch_bounds__(1024) k(const float *x, float *y) {
    float v[256];
#pragma unroll
    for (int i = 0; i < 256; i++) v[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 256; i++) y[i * 1024 + threadIdx.x] = v[255 - i] * v[i ^ 5];
}
"""


@needs_nvcc
@pytest.mark.parametrize("code, said", [(UNUSED, "unused"), (WRONG, "nothing_of_that_name")])
def test_nvcc_refuses(tmp_path, code, said):
    with pytest.raises(cuda.CompileError, match=said):
        cuda.by_nvcc(code, (), ["sm_90"], tmp_path / "k")


@needs_nvrtc
@pytest.mark.parametrize("code, said", [(UNUSED, "unused"), (WRONG, "nothing_of_that_name")])
def test_nvrtc_refuses(code, said):
    with pytest.raises(cuda.CompileError, match=said):
        cuda.by_nvrtc(code, (), "sm_90")


@needs_nvcc
def test_spills_registers_and_shared_memory_are_seen(tmp_path):
    spilling, = cuda.by_nvcc(SPILLS, (), ["sm_90"], tmp_path / "a")
    assert spilling.spilled > 0 and spilling.registers > 16 and spilling.shared == 0
    shared = BARE.format("__shared__ float s[100]; s[n] = 1.f; __syncthreads(); x[0] = s[0];")
    use, = cuda.by_nvcc(shared, (), ["sm_90"], tmp_path / "b")
    assert use.shared >= 400 and use.spilled == 0


def test_the_table_puts_both_types_on_a_line():
    by_type = {"fp16": [cuda.Use("k", "sm_80", 40, 16, 0)], "bf16": [cuda.Use("k", "sm_80", 42, 16, 0)]}
    assert cuda.table(by_type)[1:] == [f"{'kernel':24}{'sm_80':>24}", f"{'k':24}{'40/42 16 0':>24}"]
