"""Several experts on a rank, on the CuPy look-alike: cuBLAS's grouped products, and the section `several` of `hpcmoe bench gpu`."""

import numpy as np
import pytest

from cudabed.lookalike_fixtures import cp, needs_lookalike  # noqa: F401
from hpcmoe.bench import several
from hpcmoe.bench.bed import Bed, Options
from hpcmoe.bench.record import Section
from hpcmoe.bench.timing import Deadline
from hpcmoe.model.dtypes import from_fp32, to_fp32

pytestmark = needs_lookalike
ROUNDING = {"fp16": 2.0**-10, "bf16": 2.0**-7}


@pytest.fixture(scope="module")
def gpu(cp):  # noqa: F811
    from hpcmoe import device
    device.cupy_status.cache_clear()
    yield device.Gpu(0)
    device.cupy_status.cache_clear()


@pytest.fixture
def bed(gpu, request, tmp_path):
    bed = Bed(gpu, Options(small=True, dtype=getattr(request, "param", "fp16")), tmp_path)
    yield bed
    bed.release()


def fp64(array) -> np.ndarray:
    return to_fp32(array if isinstance(array, np.ndarray) else array.get()).astype(np.float64)


def measured(bed) -> Section:
    section = Section("several")
    several.several(bed, section, Deadline(1000))
    return section


def by_way(section: Section) -> dict[str, list[dict]]:
    found = {}
    for point in section.points.get("several", []):
        found.setdefault(point["way"], []).append(point)
    return found


# ---------------------------------------------------------------- the product
def queue_grouped(gpu, dtype, groups) -> None:
    """groups: W, x, out on the device; those without rows take no part."""
    groups = [group for group in groups if len(group[1])]
    addresses = gpu.upload(np.array([[array.data.ptr for array in kind] for kind in zip(*groups)]))
    gpu.blas.grouped(gpu.current.handle, [(len(x), *weight.shape) for weight, x, _ in groups], np.dtype(dtype), addresses)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_grouped_products_are_those_of_a_loop(gpu, dtype):
    rng = np.random.default_rng(0)
    shapes = [(3, 16, 24), (0, 16, 24), (1, 8, 40), (7, 5, 8), (0, 1, 8), (2, 16, 24)]  # t, n, k
    host = [[from_fp32(rng.standard_normal(size, np.float32), dtype) for size in ((n, k), (t, k))] for t, n, k in shapes]
    lane = gpu.lane(products=True)
    with lane:
        there = [(gpu.upload(w), gpu.upload(x), gpu.upload(np.full((len(x), len(w)), 0xFFFF, np.uint16).view(x.dtype))) for w, x in host]
        queue_grouped(gpu, there[0][0].dtype, there)
        gpu.event().record().wait()
        for (w, x), (_, _, out) in zip(host, there):
            np.testing.assert_allclose(fp64(out), fp64(x) @ fp64(w).T, rtol=ROUNDING[dtype], atol=1e-5)


def test_what_cublas_refuses_is_refused(gpu, cp):  # noqa: F811
    lane, dtype = gpu.lane(products=True), np.dtype(np.float16)
    with lane:
        w, x, out = (gpu.upload(np.zeros((16, 16), np.float16)) for _ in range(3))
        pinned = gpu.pinned((3, 1), np.int64)
        pinned[:, 0] = w.data.ptr, x.data.ptr, out.data.ptr
        on_host = type("Pinned", (), {"data": type("Data", (), {"ptr": pinned.ctypes.data}), "strides": pinned.strides})
        with pytest.raises(cp.cuda.cublas.CUBLASError):  # addresses that lie on the host
            gpu.blas.grouped(lane.handle, [(16, 16, 16)], dtype, on_host)
        with pytest.raises(cp.cuda.cublas.CUBLASError, match="INVALID_VALUE"):
            gpu.blas.grouped(lane.handle, [(-1, 16, 16)], dtype, gpu.upload(np.array(pinned)))
        with pytest.raises(cp.cuda.cublas.CUBLASError, match="NOT_SUPPORTED"):
            addresses = gpu.upload(np.array(pinned))
            lane.capture(lambda: gpu.blas.grouped(lane.handle, [(16, 16, 16)], dtype, addresses))


@pytest.mark.parametrize("wrong", ["host", "odd"])
def test_matrices_of_groups_lie_on_the_device_and_are_aligned(gpu, cp, wrong):  # noqa: F811
    lane, host = gpu.lane(products=True), gpu.pinned((16, 16), np.float16)
    with lane:
        w, out = (gpu.upload(np.zeros((16, 16), np.float16)) for _ in range(2))
        x = {"host": host.ctypes.data, "odd": w.data.ptr + 8}[wrong]
        addresses = gpu.upload(np.array([[w.data.ptr], [x], [out.data.ptr]]))
        gpu.blas.grouped(lane.handle, [(8, 16, 16)], np.dtype(np.float16), addresses)
        with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="no device memory" if wrong == "host" else "MisalignedAddress"):
            gpu.event().record().wait()


# ---------------------------------------------------------------- the step
@pytest.mark.parametrize("n_e", [[3, 5], [4, 0, 1, 0, 2, 9], several.skewed(8, 4)])
@pytest.mark.parametrize("bed", ["fp16", "bf16"], indirect=True)
def test_every_way_is_the_plain_loop(bed, n_e):
    d, f, dtype = 16, 24, bed.options.dtype
    sides = [bed.gpu.lane(products=True) for _ in range(3)]
    lane = bed.timer.lane
    with lane:
        weights = [(bed.normal((2 * f, d), 0.25), bed.normal((d, f), 0.2)) for _ in n_e]
        step = several.Step(bed, weights, n_e)
        bed.gpu.event().record().wait()
        first, want = 0, []
        for (both, down), n in zip(weights, n_e):
            for x_d in fp64(step.x_id)[first:first + n]:
                hidden = fp64(from_fp32((fp64(both) @ x_d).astype(np.float32), dtype))
                act = hidden[:f] / (1 + np.exp(-hidden[:f])) * hidden[f:]
                want.append(fp64(down) @ fp64(from_fp32(act.astype(np.float32), dtype)))
            first += n
        found = several.ways(step, sides)
        assert list(found)[0] == several.ONE and list(found)[-1] == several.GEMM
        assert ("4 streams" in found) == (sum(n > 0 for n in n_e) >= 4)
        for way, call in found.items():
            step.spoil()
            call()
            np.testing.assert_allclose(fp64(step.y_id), want, rtol=4 * ROUNDING[dtype], atol=2 * ROUNDING[dtype], err_msg=way)


@pytest.mark.parametrize("experts", several.EXPERTS)
def test_skewed_rows_are_as_many(experts):
    n_e = several.skewed(experts, several.SKEWED_ROWS)
    assert len(n_e) == experts and sum(n_e) == experts * several.SKEWED_ROWS
    assert n_e[0] == max(n_e) == 3 * sum(n_e) // 4 and min(n_e) >= 0


# ---------------------------------------------------------------- the section
def test_all_ways_are_timed(bed):
    section = measured(bed)
    assert section.status == "done", section.error
    found = by_way(section)
    assert {way: len(points) for way, points in found.items()} == {"one stream": 9, "2 streams": 9, "4 streams": 5, "grouped GEMM": 9}
    assert all(point["time_ms"] > 0 and point["over_weights_ratio"] > 0 for points in found.values() for point in points)
    assert all(point["over_one_stream_ratio"] == 1 and point["spread_ms"] >= 0 for point in found["one stream"])
    assert len(section.notes) == 9 and all("fastest is" in note for note in section.notes)


def test_a_missing_join_is_found(bed, monkeypatch):
    """The current lane does not wait for the others: rows of theirs are not there yet."""
    from hpcmoe.device import GpuLane
    right = GpuLane.after

    def wrong(lane, event):
        if lane is not lane.gpu.current:
            right(lane, event)
    monkeypatch.setattr(GpuLane, "after", wrong)
    section = measured(bed)
    assert section.status == "failed" and "2 streams: y: " in section.error
    assert set(by_way(section)) == {"one stream", "grouped GEMM"}  # the others are measured all the same


def test_a_wrong_group_is_found(bed, monkeypatch):
    right = type(bed.gpu.blas).grouped
    monkeypatch.setattr(type(bed.gpu.blas), "grouped", lambda self, handle, shapes, dtype, addresses:
                        right(self, handle, [*shapes[:-1], (shapes[-1][0] - 1, *shapes[-1][1:])], dtype, addresses))
    section = measured(bed)
    assert section.status == "failed" and "2 experts, 4 rows each on average, balanced: grouped GEMM: y: " in section.error
    assert "grouped GEMM" not in by_way(section)


def test_an_older_cublas_is_named(bed, monkeypatch):
    monkeypatch.setattr(bed.gpu.blas, "_grouped", None)
    section = measured(bed)
    points = by_way(section)
    assert section.status == "done" and len(points["2 streams"]) == 9
    assert {point["refused"] for point in points["grouped GEMM"]} == {
        "this cuBLAS has no cublasGemmGroupedBatchedEx: CUDA 12.5 and later have it"}


def test_what_is_not_supported_is_named_and_other_errors_are_errors(bed, cp, monkeypatch):  # noqa: F811
    monkeypatch.setattr(bed.gpu.blas, "_grouped", lambda *args: 15)
    section = measured(bed)
    assert section.status == "done"
    assert {point["refused"] for point in by_way(section)["grouped GEMM"]} == {"cublasGemmGroupedBatchedEx: CUBLAS_STATUS_NOT_SUPPORTED"}
    monkeypatch.setattr(bed.gpu.blas, "_grouped", lambda *args: 7)
    with pytest.raises(cp.cuda.cublas.CUBLASError, match="INVALID_VALUE") as error:
        measured(bed)
    bed.gpu.settle()  # the addresses are still on their way, from memory that the error's frames keep
    assert error.value.status == 7
