"""Compiles the .cu files of this folder for one device and one 16-bit type, and launches their kernels.

Letters: T is the 16-bit type (fp16, or bf16 whose bits NumPy and CuPy hold as uint16).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable

import numpy as np

HERE = Path(__file__).resolve().parent
T_DTYPE = {"fp16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}


def source(name: str, known: set[str] | None = None) -> str:
    """The text of a .cu file with the .cuh files of this folder where they are first included, each once."""
    known = set() if known is None else known

    def text(match) -> str:
        if match[1] in known:
            return ""
        known.add(match[1])
        return source(match[1], known).replace("#pragma once\n", "")
    return re.sub(r'#include "(\w+\.cuh)"', text, (HERE / name).read_text())


def names() -> list[str]:
    """The .cu files, sorted."""
    return sorted(path.name for path in HERE.glob("*.cu"))


def options(dtype: str) -> tuple[str, ...]:
    """Compiler options for the 16-bit type `dtype`, "fp16" or "bf16"."""
    return ("-std=c++17", "-DHM_BF16") if dtype == "bf16" else ("-std=c++17",)


def valid(rows, most: int) -> int:
    """Rows that there are: `rows` int32 [1] on the host, None for all; `most` are in the arrays."""
    return most if rows is None else min(int(rows[0]), most)


class Kernels:
    """Launches kernels by file and name, compiled at their first use.

    module(code, options) compiles: an object with get_function(name), whose result is called with
    (grid, block, args, shared_mem=bytes), as cupy.RawModule's is. sms: multiprocessors of the
    device. launches: how many there were so far.
    """

    def __init__(self, dtype: str, module: Callable, sms: int):
        self.dtype, self.t_dtype, self.sms = dtype, T_DTYPE[dtype], sms
        self.launches = 0
        self._module = module
        self._modules: dict = {}
        self._functions: dict = {}

    def compile(self, files: list[str]) -> None:
        """Compiles files before their first use: that takes seconds. Raises UserError where it cannot be done here."""
        for file in files:
            self._file(file).compile()

    def function(self, file: str, name: str):
        """The compiled kernel."""
        key = file, name
        if key not in self._functions:
            self._functions[key] = self._file(file).get_function(name)
        return self._functions[key]

    def _file(self, file: str):
        if file not in self._modules:
            self._modules[file] = self._module(source(file), options(self.dtype))
        return self._modules[file]

    def launch(self, file: str, name: str, grid: tuple, block: tuple, args: tuple, shared: int = 0) -> None:
        """Puts a kernel on the current stream. args: arrays, NumPy scalars of the kernel's types, None for a null pointer."""
        function = self.function(file, name)
        self.launches += 1
        function(grid, block, tuple(np.uintp(0) if a is None else a for a in args), shared_mem=shared)
