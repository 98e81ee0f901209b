"""Kernels from source: compiled for the CPU, launched on a stream, run on the shadow of device memory."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from . import _memory, _stream
from ._array import ndarray
from ._errors import CompileException, CUDARuntimeError

SHARED, SHARED_MOST = 48 * 1024, 227 * 1024


@functools.cache
def _cudacpu():
    """The module cudacpu of the folder two above, as part of its package but under a name of our own."""
    folder, name = Path(__file__).resolve().parents[2], "hpcmoe_tests_cuda"
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.cudacpu")


class RawModule:
    """As cupy.RawModule(code=, options=, backend=). Compiled when the first kernel is asked for."""

    def __init__(self, code=None, *, path=None, options=(), backend="nvrtc", translate_cucomplex=False,
                 enable_cooperative_groups=False, name_expressions=None, jitify=False):
        if code is None or path is not None or name_expressions:
            raise NotImplementedError("the CuPy look-alike compiles code= with extern \"C\" kernels only")
        self.code, self.options, self.backend = code, tuple(options), backend

    @functools.cached_property
    def _module(self):
        # Ranks of one machine compile the same code: one does it, the others find it in the cache.
        with open(Path(tempfile.gettempdir()) / f"hpcmoe-cudacpu-{os.getuid()}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                return _cudacpu().Module(self.code, self.options)
            except RuntimeError as error:
                raise CompileException(str(error)) from error

    def compile(self, log_stream=None) -> None:
        self._module

    def get_function(self, name: str) -> "RawKernel":
        try:
            return RawKernel(self._module.get_function(name), name)
        except AttributeError as error:
            raise CUDARuntimeError(500, f"no kernel named {name}") from error


class RawKernel:
    """As cupy.RawKernel: kernel(grid, block, args, shared_mem=bytes)."""

    max_dynamic_shared_size_bytes = SHARED

    def __init__(self, function, name: str):
        self._function, self.name = function, name

    def __call__(self, grid, block, args, *, shared_mem=0):
        grid, block = ((*map(int, t), 1, 1)[:3] for t in (grid, block))
        if min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise CUDARuntimeError(1, f"{self.name}: grid {grid}")
        if min(block) < 1 or np.prod(block) > 1024 or block[2] > 64:
            raise CUDARuntimeError(1, f"{self.name}: block {block}")
        if shared_mem > min(SHARED_MOST, max(SHARED, self.max_dynamic_shared_size_bytes)):
            raise CUDARuntimeError(1, f"{self.name}: {shared_mem} bytes of dynamic shared memory; "
                                      f"max_dynamic_shared_size_bytes is {self.max_dynamic_shared_size_bytes}")
        values = tuple(self._value(i, argument) for i, argument in enumerate(args))
        sizes = [value.nbytes for value in values]
        if sizes != list(self._function.sizes):
            raise TypeError(f"{self.name}: arguments of {sizes} bytes, the kernel takes {list(self._function.sizes)}")
        _stream.put(_stream.get_current_stream(), lambda: self._function(grid, block, values, shared_mem=shared_mem), self.name)

    def _value(self, i: int, argument):
        """What the CPU's kernel gets: scalars as they are, addresses of device memory as addresses of its shadow."""
        if isinstance(argument, ndarray):
            argument = np.uintp(argument.data.ptr)
        elif not isinstance(argument, np.generic):
            raise TypeError(f"{self.name}: argument {i}: unsupported type {type(argument)}; "
                            "device arrays and NumPy scalars of the kernel's types are wanted")
        if argument.dtype.itemsize == 8 and argument.dtype.kind in "iu" and _memory.on_device(int(argument) & 2**64 - 1):
            return np.uintp(_memory.shadow(int(argument), 1))
        return argument
