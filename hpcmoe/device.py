"""Where arrays live. The only module that imports CuPy; everything else takes `xp` from its arrays.

On NumPy, streams and events are null objects, so that callers have no branches.
"""

from __future__ import annotations

import functools
import importlib

import numpy as np


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


def gpus() -> list[str]:
    """Names of the GPUs that this process sees, e.g. ["NVIDIA H100 80GB HBM3"]."""
    cupy, _ = cupy_status()
    if cupy is None:
        return []
    runtime = cupy.cuda.runtime
    return [runtime.getDeviceProperties(i)["name"].decode() for i in range(runtime.getDeviceCount())]


def xp_of(array):
    """The array module of `array`: numpy, or cupy for a device array."""
    if isinstance(array, np.ndarray):
        return np
    return importlib.import_module(type(array).__module__.split(".")[0])


def to_host(array) -> np.ndarray:
    """A NumPy array with the values of `array` (itself where it is one already)."""
    return array if isinstance(array, np.ndarray) else array.get()
