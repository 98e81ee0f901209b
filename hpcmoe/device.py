"""Where arrays live and work is queued: the CPU, or one GPU through CuPy (the only module that imports it).

A `Device` is the CPU: its lanes, events and ranges are null objects, its pinned memory is memory,
so that callers have no branches. A `Gpu` queues: what is called within `with lane:` goes to that
lane's stream and returns at once; `event().record()` marks the place, `event.done` tells.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from typing import Mapping, NamedTuple, Sequence

import numpy as np

from hpcmoe.compiled import Compiled
from hpcmoe.cublas import Blas
from hpcmoe.errors import UserError

COPY_DEFAULT = 4  # cudaMemcpyKind: both sides are known by their addresses
NOT_READY = 600   # cudaErrorNotReady
WORKSPACE = 32 << 20  # bytes for cuBLAS from compute capability 9.0 on, as much as it takes by itself; before, a quarter


class GpuInfo(NamedTuple):
    """One visible GPU; memory in bytes; pci: its address, e.g. 0000:4e:00.0; capability: e.g. (9, 0)."""

    index: int
    name: str
    pci: str
    memory: int
    capability: tuple[int, int]


@functools.cache
def cupy_status() -> tuple[object | None, str]:
    """(the cupy module, "") where it imports and sees a GPU, else (None, the reason why not)."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        return None, f"CuPy does not import: {error}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return None, f"CuPy {cupy.__version__}: {error}"
    if count == 0:
        return None, f"CuPy {cupy.__version__}: no GPU is visible"
    return cupy, ""


def gpus() -> list[GpuInfo]:
    """The GPUs that this process sees, in CUDA's order."""
    cupy, _ = cupy_status()
    if cupy is None:
        return []
    found = []
    for i in range(cupy.cuda.runtime.getDeviceCount()):
        p = cupy.cuda.runtime.getDeviceProperties(i)
        pci = f"{p['pciDomainID']:04x}:{p['pciBusID']:02x}:{p['pciDeviceID']:02x}.0"
        found.append(GpuInfo(i, p["name"].decode(), pci, int(p["totalGlobalMem"]), (p["major"], p["minor"])))
    return found


def early_context(local_rank: int | None, env: Mapping[str, str], arguments: Sequence[str] = ()) -> None:
    """A CUDA context before MPI starts, where Open MPI is told to use smcuda: that looks for one then, and not later.

    arguments: of the command line; a job that asks for CPUs there needs no context.
    """
    if "smcuda" in env.get("OMPI_MCA_btl", "") and not any("device=cpu" in a for a in arguments) and gpus():
        Gpu((local_rank or 0) % len(gpus()))


def xp_of(array):
    """The array module of `array`: numpy, or cupy for a device array."""
    if isinstance(array, np.ndarray):
        return np
    return importlib.import_module(type(array).__module__.split(".")[0])


def to_host(array) -> np.ndarray:
    """A NumPy array with the values of `array` (itself where it is one already)."""
    return array if isinstance(array, np.ndarray) else array.get()


def address(array) -> int:
    """Where the first byte of an array is."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


# ---------------------------------------------------------------- the CPU
class Event:
    """A place in a stream; on the CPU everything called has been done."""

    done = True

    def record(self) -> "Event":
        """Marks the end of what has been queued on the current lane."""
        return self

    def wait(self) -> None:
        """Returns when the work before the mark is done."""


class Lane(contextlib.AbstractContextManager):
    """A stream: `with lane:` queues work on it."""

    def __exit__(self, *exc):
        return None

    def after(self, event: Event) -> None:
        """What is queued from now on starts when `event` is done; the host goes on."""


class Device:
    """The CPU, and the interface of any device. kind: "cpu" or "gpu"; xp: the arrays' module; in_host_memory: are they there?"""

    kind, name, xp, in_host_memory = "cpu", "CPU", np, True

    def lane(self, products: bool = False) -> Lane:
        """A stream of its own. products: also what its products need, else that is made with the first of them."""
        return Lane()

    def event(self, timing: bool = False) -> Event:
        return Event()

    def elapsed_s(self, start: Event, end: Event) -> float:
        """Seconds between two recorded events with timing."""
        return 0.0

    def empty(self, shape, dtype):
        """An array on the device."""
        return np.empty(shape, dtype)

    def pinned(self, shape, dtype) -> np.ndarray:
        """Host memory that copies to and from the device may use in the background."""
        return np.empty(shape, dtype)

    def upload(self, array: np.ndarray):
        """A device array with the values of a host array."""
        return array

    def copy(self, target, source) -> None:
        """Queues target = source: contiguous, of one size; on a GPU each a device array or pinned host memory."""
        target[...] = source.view(target.dtype).reshape(target.shape)

    def zero(self, target) -> None:
        """Queues target = 0: contiguous."""
        target[...] = 0

    def range(self, text: str):
        """A named range of a profile, as a context manager."""
        return contextlib.nullcontext()


# ---------------------------------------------------------------- one GPU
class GpuEvent(Event):
    def __init__(self, cupy, timing: bool):
        self.cupy = cupy
        self.event = cupy.cuda.Event(block=False, disable_timing=not timing)

    @property
    def done(self) -> bool:
        # CuPy's own `done` takes work that failed for work that is not finished: the wait would last for ever.
        status = self.cupy.cuda.runtime.eventQuery(self.event.ptr)
        if status not in (0, NOT_READY):
            raise self.cupy.cuda.runtime.CUDARuntimeError(status)
        return status == 0

    def record(self) -> "GpuEvent":
        self.event.record(self.cupy.cuda.get_current_stream())
        return self

    def wait(self) -> None:
        self.event.synchronize()


class GpuLane(Lane):
    """A stream, and for products a cuBLAS handle with a workspace, which must not serve two streams at once."""

    def __init__(self, gpu: "Gpu"):
        self.gpu = gpu
        self.stream = gpu.cupy.cuda.Stream(non_blocking=True)
        self.before: list = []

    @functools.cached_property
    def handle(self) -> int:
        self.workspace = self.gpu.empty(WORKSPACE if self.gpu.capability >= (9, 0) else WORKSPACE // 4, np.uint8)
        return self.gpu.blas.handle(self.stream.ptr, self.workspace.data.ptr, self.workspace.nbytes)

    def __enter__(self) -> "GpuLane":
        self.before.append(self.gpu.current)
        self.gpu.current = self
        self.stream.__enter__()
        return self

    def __exit__(self, *exc):
        self.stream.__exit__(*exc)
        self.gpu.current = self.before.pop()

    def after(self, event: Event) -> None:
        self.stream.wait_event(event.event)

    def capture(self, func):
        """What func() queues on this lane, as a graph with .launch(): nothing of it is run yet."""
        self.stream.begin_capture()
        try:
            func()
        finally:
            graph = self.stream.end_capture()
        return graph


class Gpu(Device):
    """One GPU for this process. Raises UserError where CuPy cannot use it.

    name, sms (multiprocessors), capability, info: what it is; current: the lane whose stream is the current one.
    """

    kind, in_host_memory = "gpu", False

    def __init__(self, index: int):
        self.cupy, reason = cupy_status()
        if self.cupy is None:
            raise UserError(f"no GPU can be used: {reason}")
        self.xp, self.runtime = self.cupy, self.cupy.cuda.runtime
        try:
            self.cupy.cuda.Device(index).use()
            self.runtime.free(0)  # the context: before MPI looks for one
            self.blas = Blas(importlib.import_module("cupy.cuda").cublas)
        except (self.runtime.CUDARuntimeError, ImportError) as error:
            raise UserError(f"GPU {index}: {error}") from error
        self.info = gpus()[index]
        self.name, self.capability = self.info.name, self.info.capability
        if self.capability < (8, 0):
            raise UserError(f"GPU {index}: {self.name} has compute capability {self.capability[0]}.{self.capability[1]}: "
                            "expected 8.0 or later (A100, H100, ...); run.device = cpu runs without it")
        self.sms = int(self.runtime.getDeviceProperties(index)["multiProcessorCount"])
        self.current: GpuLane | None = None
        self.gemms = 0

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of this GPU."""
        free, total = self.runtime.memGetInfo()
        return int(free), int(total)

    def settle(self) -> None:
        """Waits for everything queued so far, and gives back memory that is only kept for later: before the run."""
        self.runtime.deviceSynchronize()
        self.cupy.get_default_memory_pool().free_all_blocks()

    def lane(self, products: bool = False) -> GpuLane:
        lane = GpuLane(self)
        if products:
            _ = lane.handle  # takes its memory now, before what is left of it is shared out
        return lane

    def event(self, timing: bool = False) -> GpuEvent:
        return GpuEvent(self.cupy, timing)

    def elapsed_s(self, start: GpuEvent, end: GpuEvent) -> float:
        return self.cupy.cuda.get_elapsed_time(start.event, end.event) / 1e3

    def empty(self, shape, dtype):
        try:
            return self.cupy.empty(shape, dtype)
        except self.cupy.cuda.memory.OutOfMemoryError as error:
            need = math.prod(shape if isinstance(shape, tuple) else (shape,)) * np.dtype(dtype).itemsize
            free, total = self.memory()
            raise UserError(f"out of GPU memory on {self.name}: {need / 2**30:.3g} GiB wanted, {free / 2**30:.3g} of "
                            f"{total / 2**30:.3g} GiB are free: use more ranks (layout.pp, layout.ep), or lower "
                            "run.batch_tokens") from error

    def pinned(self, shape, dtype) -> np.ndarray:
        count = math.prod(shape if isinstance(shape, tuple) else (shape,))
        memory = self.cupy.cuda.alloc_pinned_memory(max(1, count * np.dtype(dtype).itemsize))
        return np.frombuffer(memory, dtype, count).reshape(shape)

    def upload(self, array: np.ndarray):
        target = self.empty(array.shape, array.dtype)
        if array.size:
            target.set(np.ascontiguousarray(array))
        return target

    def copy(self, target, source) -> None:
        if target.nbytes:
            self.runtime.memcpyAsync(address(target), address(source), target.nbytes, COPY_DEFAULT,
                                     self.cupy.cuda.get_current_stream().ptr)

    def zero(self, target) -> None:
        if target.nbytes:
            self.runtime.memsetAsync(address(target), 0, target.nbytes, self.cupy.cuda.get_current_stream().ptr)

    def range(self, text: str):
        return _Range(self.cupy.cuda.nvtx, text)

    def module(self, code: str, options: tuple[str, ...]):
        """Compiled CUDA source, by NVRTC; CuPy keeps the result on disk. UserError where it does not compile here."""
        return Compiled(self.cupy, code, options)

    def gemm(self, x_tk, weight_nk, out_tn) -> None:
        """Queues out = x W^T with fp32 sums: x and W fp16 (float16 arrays) or bf16 (uint16), out that or fp32."""
        if len(x_tk):
            self.gemms += 1
            self.blas.gemm(self.current.handle, x_tk, weight_nk, out_tn)


class _Range(contextlib.AbstractContextManager):
    def __init__(self, nvtx, text: str):
        self.nvtx, self.text = nvtx, text

    def __enter__(self):
        self.nvtx.RangePush(self.text)

    def __exit__(self, *exc):
        self.nvtx.RangePop()
