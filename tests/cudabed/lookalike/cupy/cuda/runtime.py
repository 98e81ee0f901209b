"""As cupy.cuda.runtime: the functions of the CUDA runtime that hpcmoe calls by their own names."""

import ctypes
import os

from .. import _memory, _stream
from .._errors import CUDARuntimeError  # noqa: F401
from .._memory import pin as _pin

memcpyHostToHost, memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice, memcpyDefault = range(5)
_OPERANDS = {0: ("host", "host"), 1: ("device", "host"), 2: ("host", "device"), 3: ("device", "device"), 4: ("any", "any")}
CUDA_R_32F, CUDA_R_64F, CUDA_R_16F, CUDA_R_8I, CUDA_R_8U, CUDA_R_16BF = 0, 1, 2, 3, 8, 14
streamCaptureModeGlobal, streamCaptureModeThreadLocal, streamCaptureModeRelaxed = range(3)
is_hip = False


# ---------------------------------------------------------------- devices
def driverGetVersion() -> int:
    return 13000


def runtimeGetVersion() -> int:
    return 13000


def getDeviceCount() -> int:
    return _memory.device_count()


def getDevice() -> int:
    return _memory.current_device()


def setDevice(device: int) -> None:
    if not 0 <= device < getDeviceCount():
        raise CUDARuntimeError(101)
    _memory.context(device)


def deviceGetPCIBusId(device: int) -> str:
    return f"0000:{device + 1:02x}:00.0"


def getDeviceProperties(device: int) -> dict:
    if not 0 <= device < getDeviceCount():
        raise CUDARuntimeError(101)
    return {"name": b"CuPy look-alike", "totalGlobalMem": _memory.info()[1], "major": 9, "minor": 0, "warpSize": 32,
            "multiProcessorCount": int(os.environ.get("LOOKALIKE_SMS", "4")), "maxThreadsPerBlock": 1024,
            "sharedMemPerBlock": 48 << 10, "sharedMemPerBlockOptin": 227 << 10, "sharedMemPerMultiprocessor": 228 << 10,
            "l2CacheSize": 50 << 20, "clockRate": 1000000, "memoryClockRate": 1000000, "memoryBusWidth": 5120,
            "pciDomainID": 0, "pciBusID": device + 1, "pciDeviceID": 0, "canMapHostMemory": 1, "unifiedAddressing": 1,
            "integrated": 0, "ECCEnabled": 1, "concurrentKernels": 1, "asyncEngineCount": 2}


def deviceSynchronize() -> None:
    _stream.device_synchronize()


def streamSynchronize(stream: int) -> None:
    _stream.by_pointer[stream].synchronize()


def eventQuery(event: int) -> int:
    """0 where the event is done, else cudaErrorNotReady (600)."""
    return 0 if _stream.events[event].done else 600


# ---------------------------------------------------------------- memory
def memGetInfo() -> tuple:
    return _memory.info()


def free(pointer: int) -> None:
    """free(0) makes the device's context, as everywhere; other memory belongs to the pool."""
    if pointer:
        raise CUDARuntimeError(1, "the look-alike frees no memory of its pool")
    _memory.context(_memory.current_device())


def hostRegister(pointer: int, size: int, flags: int = 0) -> None:
    _pin(pointer, size)


def hostUnregister(pointer: int) -> None:
    _memory.unpin(pointer)


def memcpyAsync(dst: int, src: int, size: int, kind: int, stream: int) -> None:
    """Host memory must be pinned: with other memory the real copy would not be asynchronous."""
    if size == 0:
        return
    for pointer, where in zip((dst, src), _OPERANDS[kind]):
        _memory.check_operand(int(pointer), size, where)
    _stream.put(_stream.by_pointer[stream], lambda: _memory.copy_now(int(dst), int(src), size), "memcpyAsync")


def memcpy(dst: int, src: int, size: int, kind: int) -> None:
    """At once, after the work on the null stream; any host memory."""
    _stream.Stream.null.synchronize()
    to, source = (_memory.shadow(int(p), size) if _memory.on_device(int(p)) else int(p) for p in (dst, src))
    ctypes.memmove(to, source, size)


def memsetAsync(ptr: int, value: int, size: int, stream: int) -> None:
    _memory.check_operand(int(ptr), size, "any")
    at = _memory.shadow(int(ptr), size) if _memory.on_device(int(ptr)) else int(ptr)
    _stream.put(_stream.by_pointer[stream], lambda: ctypes.memset(at, value, size), "memsetAsync")
