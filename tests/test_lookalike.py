"""The CuPy look-alike: it refuses what CuPy refuses, and runs nothing before somebody waits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cudabed.lookalike_fixtures import (KERNELS, add, cp, kernels, needs_lookalike, numbers, outside, peek,  # noqa: F401
                                     stream)

pytestmark = needs_lookalike

# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize("touch", [
    lambda x, cp: np.asarray(x), lambda x, cp: np.add(x, 1), lambda x, cp: numbers() + x, lambda x, cp: x + numbers(),
    lambda x, cp: np.concatenate([x, x]), lambda x, cp: float(x[:1]), lambda x, cp: int(x[0]), lambda x, cp: bool(x[0]),
    lambda x, cp: list(x), lambda x, cp: 3 in x, lambda x, cp: x == x, lambda x, cp: x[0] < 3, lambda x, cp: range(x[0]),
    lambda x, cp: x.__setitem__(slice(0, 8), numbers()), lambda x, cp: {x: 1}, lambda x, cp: x * 2, lambda x, cp: -x,
    lambda x, cp: sorted(x), lambda x, cp: np.sum(x), lambda x, cp: np.zeros(8, np.int32).__iadd__(x)])
def test_nothing_converts_behind_the_callers_back(cp, touch):
    with pytest.raises(TypeError):
        touch(cp.asarray(numbers()), cp)


def test_advanced_indexing_and_conversions_are_not_there(cp):
    x = cp.asarray(numbers())
    for index in ([1, 2], np.array([1, 2]), np.ones(8, bool), True):
        with pytest.raises(NotImplementedError):
            x[index]
    with pytest.raises(NotImplementedError):
        x[:4] = cp.zeros(4, np.float32)
    with pytest.raises(ValueError, match="overlap"):
        x[1:] = x[:-1]


def test_a_kernel_takes_device_arrays_and_scalars_of_its_types_only(cp, kernels):
    add, y = kernels["add"], cp.zeros(8, np.int32)
    good = y, y, np.int32(1), np.int32(8)
    for i, bad in [(1, numbers()), (2, 1), (2, np.int64(1)), (1, np.int32(1)), (1, None), (2, y)]:
        with pytest.raises(TypeError):
            add((1,), (32,), good[:i] + (bad,) + good[i + 1:])
    with pytest.raises(TypeError):
        add((1,), (32,), good[:3])
    for grid, block, shared in [((0,), (32,), 0), ((1,), (1025,), 0), ((1, 65536), (32,), 0), ((1,), (32,), 49153)]:
        with pytest.raises(cp.cuda.runtime.CUDARuntimeError):
            add(grid, block, good, shared_mem=shared)
    with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="no kernel named"):
        cp.RawModule(code=KERNELS).get_function("subtract")
    with pytest.raises(cp.cuda.compiler.CompileException):
        cp.RawModule(code="int main( {").get_function("add")


def test_large_shared_memory_needs_permission(cp, kernels):
    n = 15000
    y = cp.asarray(numbers(n))
    kernel = kernels["reverse"]
    with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="max_dynamic_shared_size_bytes"):
        kernel((1,), (64,), (y, np.int32(n)), shared_mem=4 * n)
    kernel.max_dynamic_shared_size_bytes = 4 * n
    kernel((1,), (64,), (y, np.int32(n)), shared_mem=4 * n)
    assert (y.get() == numbers(n)[::-1]).all()


def test_the_cpu_cannot_touch_device_memory():
    touch = "import cupy, ctypes; x = cupy.zeros(8); x.get(); ctypes.string_at(x.data.ptr, 1)"
    assert outside(touch).returncode == -11


def test_number_of_devices(cp):
    code = "import cupy\ntry: print(cupy.cuda.runtime.getDeviceCount())\nexcept cupy.cuda.runtime.CUDARuntimeError as e: print(e)"
    assert outside(code, FAKECUDA_DEVICES="4").stdout.strip() == "4"
    assert outside(code, FAKECUDA_DEVICES="4", CUDA_VISIBLE_DEVICES="2,3").stdout.strip() == "2"
    assert "cudaErrorNoDevice" in outside(code, CUDA_VISIBLE_DEVICES="").stdout
    use = "import cupy; cupy.cuda.Device(1).use(); print(cupy.cuda.Device().pci_bus_id, cupy.zeros(3).data.mem.device_id)"
    assert outside(use, FAKECUDA_DEVICES="2").stdout.split() == ["0000:02:00.0", "1"]
    assert "invalid device ordinal" in outside(use, FAKECUDA_DEVICES="1").stderr


# ---------------------------------------------------------------- arrays
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_views_are_those_of_numpy(cp, data):
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5))
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=True))
    host = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    device = cp.asarray(host)
    part, expected = device[index], host[index]
    assert part.shape == np.shape(expected) and (part.get() == expected).all()
    if part.size:
        assert part.strides == host[index if isinstance(index, tuple) and Ellipsis in index else (
            (*index, ...) if isinstance(index, tuple) else (index, ...) if index is not ... else ...)].strides
    part[...] = 77
    host[index] = 77
    assert (device.get() == host).all()
    if device.size:
        assert (device.reshape(-1).view(np.uint8).get() == host.reshape(-1).view(np.uint8)).all()


def test_the_array_interface_names_the_device_address(cp):
    x = cp.zeros((4, 6), np.float16)
    part = x[2:, 1:3]
    shown = part.__cuda_array_interface__
    assert shown["data"] == (x.data.ptr + 2 * 12 + 2, False) == (part.data.ptr, False)
    assert (shown["shape"], shown["strides"], shown["typestr"], shown["version"]) == ((2, 2), (12, 2), "<f2", 3)
    assert x.__cuda_array_interface__["strides"] is None and x.flags.c_contiguous and not part.flags.c_contiguous
    assert cp.empty((0, 6)).data.ptr == 0


def test_fresh_memory_is_not_zero(cp):
    with cp.cuda.Stream(non_blocking=True):  # no freed block can be its own
        assert np.isnan(cp.empty(1001, np.float32).get()).all()


# ---------------------------------------------------------------- memory
def test_memory_counts(cp):
    pool, stream = cp.get_default_memory_pool(), cp.cuda.Stream(non_blocking=True)
    pool.free_all_blocks()
    free, total = cp.cuda.runtime.memGetInfo()
    used = pool.used_bytes()
    assert total == 256 << 20
    with stream:
        arrays = [cp.empty(1 << 20, np.uint8) for _ in range(16)]
    assert pool.used_bytes() - used == 16 << 20 and cp.cuda.runtime.memGetInfo()[0] == free - (16 << 20)
    first = arrays[0].data.ptr
    del arrays
    assert pool.used_bytes() == used and pool.free_bytes() >= 16 << 20
    with cp.cuda.Stream(non_blocking=True):  # another stream's blocks are not taken
        assert cp.empty(1 << 20, np.uint8).data.ptr != first
    with stream:
        again = [cp.empty(1 << 20, np.uint8).data.ptr for _ in range(1)]
    assert cp.cuda.runtime.memGetInfo()[0] == free - (17 << 20) and again
    pool.free_all_blocks()
    assert cp.cuda.runtime.memGetInfo()[0] == free


def test_out_of_memory(cp):
    pool = cp.get_default_memory_pool()
    with pytest.raises(cp.cuda.memory.OutOfMemoryError, match="allocating 314,572,800 bytes"):
        cp.empty(300 << 20, np.uint8)
    x = cp.empty(200 << 20, np.uint8)
    with pytest.raises(MemoryError):
        cp.empty(100 << 20, np.uint8)
    del x
    x = cp.empty(220 << 20, np.uint8)  # kept blocks are given back before it is an error
    del x
    pool.free_all_blocks()
    pool.set_limit(size=pool.total_bytes() + (1 << 20))
    with pytest.raises(MemoryError, match="limit set to"):
        cp.empty(2 << 20, np.uint8)
    pool.set_limit(size=0)
    assert cp.empty(2 << 20, np.uint8).nbytes == 2 << 20


def test_hundreds_of_arrays_need_no_mappings(cp):
    def mappings() -> int:
        with open("/proc/self/maps") as file:
            return len(file.readlines())
    before = mappings()
    arrays = [cp.zeros(100 + i) for i in range(500)]
    cp.cuda.get_current_stream().synchronize()
    assert mappings() - before < 20 and len({a.data.ptr for a in arrays}) == 500


# ---------------------------------------------------------------- laziness
def test_nothing_runs_before_somebody_waits(cp, stream, add):
    x, y = cp.asarray(numbers()), cp.zeros(8, np.int32)
    stream.synchronize()
    before, ran = cp.launches["add"], cp.executed["add"]
    add(y, x, 5)
    assert (peek(y) == 0).all() and (cp.launches["add"], cp.executed["add"]) == (before + 1, ran)
    stream.synchronize()
    assert (peek(y) == numbers() + 5).all() and cp.executed["add"] == ran + 1


def test_an_event_brings_its_own_past_and_no_more(cp, add):
    a, b = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    with a:
        x, y = cp.asarray(numbers()), cp.zeros(8, np.int32)
        a.synchronize()
        add(y, x, 1)
        first = a.record()
        add(y, x, 2)
    with b:
        z = cp.zeros(8, np.int32)
        b.wait_event(first)
        add(z, y, 10)
        last = b.record()
        w = cp.full(8, 3, np.int32)
    last.synchronize()
    assert (peek(z) == numbers() + 11).all()
    assert (peek(y) == numbers() + 1).all() and not (peek(w) == 3).any()
    assert first.done
    cp.cuda.runtime.deviceSynchronize()
    assert (peek(y) == numbers() + 2).all() and (peek(w) == 3).all()


def test_a_forgotten_wait_gives_a_wrong_result(cp, add):
    a, b = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    x, y, z = cp.asarray(numbers()), cp.zeros(8, np.int32), cp.zeros(8, np.int32)
    cp.cuda.runtime.deviceSynchronize()
    with a:
        add(y, x, 1)
    with b:
        add(z, y, 10)
        assert (z.get() == 10).all()


def test_long_chains_between_streams(cp, add):
    a, b = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    x = cp.zeros(8, np.int32)
    cp.cuda.runtime.deviceSynchronize()
    for i in range(3000):
        stream, other = (a, b) if i % 2 else (b, a)
        with stream:
            stream.wait_event(other.record())
            x.fill(i)
    stream.synchronize()
    assert (peek(x) == 2999).all()


def test_polling_done_brings_it_about(cp, stream, add):
    x, y = cp.asarray(numbers()), cp.zeros(8, np.int32)
    for i in range(40):
        add(y, x, i)
    event = stream.record()
    polls = 1
    while not event.done:
        polls += 1
        assert polls < 1000
    assert polls > 1 and (peek(y) == numbers() + 39).all()
    add(y, x, 1)
    polls = 1
    while not stream.done:
        polls += 1
        assert polls < 1000
    assert (peek(y) == numbers() + 1).all()
    assert cp.cuda.Event().done


def test_the_null_stream_waits_for_blocking_streams_only(cp, add):
    x, y, z = cp.asarray(numbers()), cp.zeros(8, np.int32), cp.zeros(8, np.int32)
    cp.cuda.runtime.deviceSynchronize()
    with cp.cuda.Stream(non_blocking=True):
        add(y, x, 1)
    with cp.cuda.Stream():
        add(z, x, 1)
    assert (y.get() == 0).all() and (z.get() == numbers() + 1).all()
    y.fill(100)
    with cp.cuda.Stream():
        add(z, y, 1)
        assert (z.get() == 101).all()


@pytest.mark.parametrize("seed", range(3))
def test_eager_runs_find_what_came_too_early(seed):
    code = """
import cupy, numpy as np
x = cupy.zeros(8, np.int32)
cupy.cuda.runtime.deviceSynchronize()
s = cupy.cuda.Stream(non_blocking=True)
with s:
    for i in range(50): x.fill(i)
print(x._host[0])
"""
    value = int(outside(code, LOOKALIKE_EAGER="0.5", LOOKALIKE_SEED=str(seed)).stdout)
    assert 0 < value < 49
    assert int(outside(code, LOOKALIKE_SEED=str(seed)).stdout) == 0
    assert int(outside(code, LOOKALIKE_EAGER="1").stdout) == 49


def test_elapsed_time(cp, stream, add):
    start, end, plain = cp.cuda.Event(), cp.cuda.Event(), cp.cuda.Event(disable_timing=True)
    x = cp.asarray(numbers())
    start.record()
    add(x, x, 1)
    end.record(), plain.record()
    with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="NotReady"):
        cp.cuda.get_elapsed_time(start, end)
    end.synchronize(), plain.synchronize()
    assert 0 < cp.cuda.get_elapsed_time(start, end) < 60e3
    with pytest.raises(cp.cuda.runtime.CUDARuntimeError):
        cp.cuda.get_elapsed_time(start, plain)
