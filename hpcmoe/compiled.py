"""CUDA source as callable kernels, by a CuPy module that the caller hands in."""

from __future__ import annotations

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


class Compiled:
    """A module of `cupy`, its RawModule, by NVRTC; CuPy keeps what was compiled on disk."""

    def __init__(self, cupy, code: str, options: tuple[str, ...]):
        self.cupy = cupy
        self.module = cupy.RawModule(code=code, options=options, backend="nvrtc")

    def compile(self) -> None:
        """Compiles now, or takes what is on disk. Raises UserError with the compiler's first words."""
        try:
            self.module.compile()
        except self.cupy.cuda.compiler.CompileException as error:
            raise UserError(f"CUDA source does not compile: {str(error).splitlines()[0]}; {HEADERS}") from error

    def get_function(self, name: str) -> Function:
        self.compile()
        return Function(self.module.get_function(name))
