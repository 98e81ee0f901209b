"""CUDA source as callable kernels, by a CuPy module that the caller hands in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Mapping

import numpy as np

from hpcmoe.errors import UserError

HEADERS = "kernels need the CUDA headers: pip install hpcmoe[cuda12] or [cuda13], or set CUDA_PATH to the site's toolkit"
STATIC_SHARED = 48 << 10  # bytes of dynamic shared memory that a kernel may have unasked


class Function:
    """A RawKernel that also takes pinned host memory, which the GPU sees at the same address."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, grid, block, args, shared_mem=0):
        if shared_mem > STATIC_SHARED and self.kernel.max_dynamic_shared_size_bytes < shared_mem:
            self.kernel.max_dynamic_shared_size_bytes = shared_mem
        args = tuple(np.uintp(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in args)
        self.kernel(grid, block, args, shared_mem=shared_mem)


def toolkit_headers(env: Mapping[str, str]) -> Path | None:
    """The headers of the site's CUDA toolkit: of CUDA_PATH, else of CUDA_HOME, else of the nvcc on PATH; None for none."""
    nvcc = shutil.which("nvcc", path=env.get("PATH", ""))
    roots = [env.get("CUDA_PATH"), env.get("CUDA_HOME"), Path(nvcc).resolve().parent.parent if nvcc else None]
    folders = (Path(root) / "include" for root in roots if root)
    return next((folder for folder in folders if (folder / "mma.h").exists()), None)


class Compiled:
    """A module of `cupy`, its RawModule, by NVRTC; CuPy keeps what was compiled on disk."""

    def __init__(self, cupy, code: str, options: tuple[str, ...]):
        self.cupy, self.code, self.options = cupy, code, options
        self.module = self._module()

    def _module(self, *more: str):
        return self.cupy.RawModule(code=self.code, options=(*self.options, *more), backend="nvrtc")

    def compile(self) -> None:
        """Compiles now, or takes what is on disk. Raises UserError with the compiler's first words.

        Where CuPy's headers are not all there, as beside a PyTorch wheel, those of the site's toolkit are asked as well.
        """
        try:
            try:
                self.module.compile()
            except self.cupy.cuda.compiler.CompileException as error:
                folder = toolkit_headers(os.environ) if "cannot open source file" in str(error) else None
                if folder is None:
                    raise
                self.module = self._module(f"-I{folder}")
                self.module.compile()
        except self.cupy.cuda.compiler.CompileException as error:
            raise UserError(f"CUDA source does not compile: {str(error).splitlines()[0]}; {HEADERS}") from error

    def get_function(self, name: str) -> Function:
        self.compile()
        return Function(self.module.get_function(name))
