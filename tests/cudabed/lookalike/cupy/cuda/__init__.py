"""As cupy.cuda."""

from .._memory import MemoryPointer, MemoryPool, PinnedMemoryPointer, UnownedMemory, alloc_pinned_memory  # noqa: F401
from .._stream import Event, Graph, Stream, get_current_stream, get_elapsed_time  # noqa: F401
from . import compiler, cublas, device, memory, nvrtc, nvtx, runtime, stream  # noqa: F401
from .device import Device, get_cublas_handle  # noqa: F401


def is_available() -> bool:
    try:
        return runtime.getDeviceCount() > 0
    except runtime.CUDARuntimeError:
        return False
