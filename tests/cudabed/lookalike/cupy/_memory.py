"""Device memory of the driver stand-in, a pool over it as CuPy's, and pinned host memory."""

from __future__ import annotations

import bisect
import collections
import ctypes
import gc
import mmap
import os
import weakref

from . import _stream
from ._errors import CUDARuntimeError, check

POISON_BYTES = 1 << 24  # fresh blocks up to this size start as 0xff bytes: NaN, or -1
ROUND = 512


def _load():
    name = os.environ.get("FAKECUDA_LIBRARY", "libcuda.so.1")
    try:
        library = ctypes.CDLL(name)
        library.fakecuda_shadow.restype = ctypes.c_void_p
    except (OSError, AttributeError) as error:
        raise ImportError(f"the CuPy look-alike needs the driver stand-in first on LD_LIBRARY_PATH: {error}") from error
    return library


_driver = _load()
_word, _size = ctypes.c_uint64, ctypes.c_size_t
_context = {}


def context(ordinal: int = 0) -> None:
    """Makes the device's context current, as CuPy's first use of a device does: MPI libraries look for it."""
    if ordinal not in _context:
        check(_driver.cuInit(0))
        found = ctypes.c_void_p()
        device = ctypes.c_int()
        check(_driver.cuDeviceGet(ctypes.byref(device), ordinal))
        check(_driver.cuDevicePrimaryCtxRetain(ctypes.byref(found), device))
        _context[ordinal] = found
    _context["now"] = ordinal
    check(_driver.cuCtxSetCurrent(_context[ordinal]))


def current_device() -> int:
    return _context.get("now", 0)


def device_count() -> int:
    check(_driver.cuInit(0))
    count = ctypes.c_int()
    check(_driver.cuDeviceGetCount(ctypes.byref(count)))
    return count.value


def info() -> tuple[int, int]:
    """Bytes of the device that are free, and all."""
    available, total = _size(), _size()
    check(_driver.cuMemGetInfo_v2(ctypes.byref(available), ctypes.byref(total)))
    return available.value, total.value


def shadow(pointer: int, nbytes: int) -> int:
    """Where the CPU reaches nbytes of device memory; raises where they are not all in one allocation."""
    found = _driver.fakecuda_shadow(_word(pointer), _size(nbytes))
    if found is None:
        raise CUDARuntimeError(1, f"{nbytes} bytes at {pointer:#x} are not in one allocation of the device")
    return found


def on_device(pointer: int) -> bool:
    return bool(_driver.fakecuda_in_pool(_word(pointer)))


def copy_now(to: int, source: int, nbytes: int) -> None:
    for pointer in (to, source):
        if not on_device(pointer) and not is_pinned(pointer, nbytes):
            raise CUDARuntimeError(1, f"the host memory at {pointer:#x} was freed before its copy ran")
    check(_driver.fakecuda_copy(_word(to), _word(source), _size(nbytes)))


def _driver_alloc(nbytes: int) -> int | None:
    context(current_device())
    pointer = _word()
    status = _driver.cuMemAlloc_v2(ctypes.byref(pointer), _size(nbytes))
    if status == 2:
        return None
    check(status)
    if nbytes <= POISON_BYTES:
        ctypes.memset(shadow(pointer.value, nbytes), 0xFF, nbytes)
    return pointer.value


class OutOfMemoryError(MemoryError):
    """As cupy.cuda.memory.OutOfMemoryError."""

    def __init__(self, size: int, total: int, limit: int = 0):
        text = f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes"
        super().__init__(text + (f", limit set to: {limit:,} bytes)." if limit else ")."))


class Memory:
    """A block of the pool; goes back to it with the last reference."""

    def __init__(self, pool, ptr: int, size: int, arena: int):
        self.pool, self.ptr, self.size, self.arena, self.device_id = pool, ptr, size, arena, current_device()

    def __del__(self):
        self.pool.give_back(self)


class UnownedMemory:
    """Memory that `owner` keeps: device memory, or pinned host memory."""

    def __init__(self, ptr: int, size: int, owner, device_id: int = -1):
        self.ptr, self.size, self.owner, self.device_id = ptr, size, owner, device_id


class MemoryPointer:
    """An address in a block that it keeps alive."""

    def __init__(self, mem, offset: int):
        self.mem, self.ptr = mem, (mem.ptr + offset if mem is not None else 0)


class MemoryPool:
    """Blocks that were freed are kept for the stream that was current when they were allocated, as in CuPy:
    the next owner's work comes after the last one's on that stream, and only there."""

    def __init__(self):
        self.free: dict = collections.defaultdict(list)
        self.used = self.held = self.limit = 0

    def malloc(self, size: int) -> MemoryPointer:
        _stream.refuse_captures("allocation")
        if size == 0:
            return MemoryPointer(None, 0)
        size = -(-size // ROUND) * ROUND
        arena = _stream.get_current_stream().ptr
        pointer = self.free[arena, size].pop() if self.free.get((arena, size)) else self._fresh(size)
        self.used += size
        return MemoryPointer(Memory(self, pointer, size, arena), 0)

    def _fresh(self, size: int) -> int:
        for attempt in range(2):
            if not self.limit or self.held + size <= self.limit:
                pointer = _driver_alloc(size)
                if pointer is not None:
                    self.held += size
                    return pointer
            if attempt == 0:
                gc.collect()
                self.free_all_blocks()
        raise OutOfMemoryError(size, self.held, self.limit)

    def give_back(self, memory: Memory) -> None:
        self.used -= memory.size
        self.free[memory.arena, memory.size].append(memory.ptr)

    def free_all_blocks(self, stream=None) -> None:
        """Back to the driver; waits for the device first, as cudaFree does."""
        blocks = [(key, p) for key, kept in self.free.items() for p in kept if stream is None or key[0] == stream.ptr]
        if blocks:
            _stream.device_synchronize()
        for key, pointer in blocks:
            self.free[key].remove(pointer)
            self.held -= key[1]
            check(_driver.cuMemFree_v2(_word(pointer)))

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        self.limit = int(info()[1] * fraction) if fraction is not None else int(size or 0)

    def get_limit(self) -> int:
        return self.limit

    def used_bytes(self) -> int:
        return self.used

    def total_bytes(self) -> int:
        return self.held

    def free_bytes(self) -> int:
        return self.held - self.used

    def n_free_blocks(self) -> int:
        return sum(map(len, self.free.values()))


pool = MemoryPool()


# ---------------------------------------------------------------- pinned host memory
_pinned: list = []  # (first byte, end), sorted


class PinnedMemoryPointer(mmap.mmap):
    """As cupy.cuda.PinnedMemoryPointer: a writable buffer with .ptr and .size(); the device sees it at the same address."""

    def __new__(cls, nbytes: int):
        self = super().__new__(cls, -1, nbytes)
        self.ptr = ctypes.addressof(ctypes.c_char.from_buffer(self))
        self.mem = self
        pin(self.ptr, nbytes)
        weakref.finalize(self, unpin, self.ptr)
        return self


def alloc_pinned_memory(size: int) -> PinnedMemoryPointer:
    _stream.refuse_captures("allocation of pinned memory")
    return PinnedMemoryPointer(max(1, -(-size // ROUND)) * ROUND)


def pin(pointer: int, nbytes: int) -> None:
    bisect.insort(_pinned, (pointer, pointer + nbytes))


def unpin(pointer: int) -> None:
    _pinned[:] = [span for span in _pinned if span[0] != pointer]


def is_pinned(pointer: int, nbytes: int) -> bool:
    i = bisect.bisect_right(_pinned, (pointer, float("inf"))) - 1
    return i >= 0 and pointer + nbytes <= _pinned[i][1]


def check_operand(pointer: int, nbytes: int, where: str) -> None:
    """Raises unless the bytes are device memory (`where` "device"), or pinned host memory ("host"), or either ("any")."""
    if where != "host" and on_device(pointer):
        shadow(pointer, nbytes)
    elif where == "device" or not is_pinned(pointer, nbytes):
        kind = {"device": "device", "host": "pinned host", "any": "device or pinned host"}[where]
        raise CUDARuntimeError(1, f"{nbytes} bytes at {pointer:#x} are no {kind} memory")
