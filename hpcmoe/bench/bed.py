"""What the sections share: the device, its kernels, a timer, random arrays, the rate of copies."""

from __future__ import annotations

import gc
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np

from hpcmoe.bench.timing import Timer, copy_gb_per_s
from hpcmoe.kernels.loader import T_DTYPE, Kernels
from hpcmoe.kernels.rows import gather_rows
from hpcmoe.model.dtypes import from_fp32

POOL = 1 << 20  # random values drawn once for each scale; larger arrays repeat them
COPY_BYTES = 1 << 30
COPY_WIDTH = 4096  # numbers in a row


@dataclass(frozen=True)
class Options:
    """What the command line says. small: tiny sizes, to try the program; mpiexec: "" for none;
    peer_python: the Python that may have torch and transformers."""

    small: bool = False
    dtype: str = "fp16"
    mpiexec: str = ""
    peer_python: str = sys.executable


class Bed:
    """One device for the sections that use it in this process; folder: for files that go when the run ends."""

    def __init__(self, gpu, options: Options, folder: Path):
        self.gpu, self.options, self.small, self.folder = gpu, options, options.small, folder
        self.timer = Timer(gpu, self.small)
        self._kernels: dict[str, Kernels] = {}
        self._pools: dict = {}
        self._copy: float | None = None
        self._folders = itertools.count()
        self.keep: Callable[[], None] = lambda: None  # writes what has been found so far

    def new_folder(self) -> Path:
        """An unused folder for a job's output."""
        return self.folder / f"job-{next(self._folders)}"

    def kernels(self, dtype: str = "") -> Kernels:
        """The kernels for a 16-bit type (default: that of the options)."""
        dtype = dtype or self.options.dtype
        if dtype not in self._kernels:
            self._kernels[dtype] = Kernels(dtype, self.gpu.module, self.gpu.sms)
        return self._kernels[dtype]

    @property
    def t_dtype(self) -> np.dtype:
        return T_DTYPE[self.options.dtype]

    def empty(self, shape, dtype):
        """An array on the device with arbitrary content."""
        return self.gpu.empty(shape, np.dtype(dtype))

    def normal(self, shape, scale: float = 1.0, kind: str = "T"):
        """Normal values on the device: of the 16-bit type ("T") or "fp32". Zeros would make products look faster."""
        kind = self.options.dtype if kind == "T" else kind
        key = kind, scale
        if key not in self._pools:
            values = np.random.default_rng(1).standard_normal(POOL, np.float32) * np.float32(scale)
            self._pools[key] = self.gpu.upload(from_fp32(values, kind))
        pool = self._pools[key]
        out = self.gpu.empty(shape, pool.dtype)
        flat = out.reshape(-1)
        done = min(POOL, flat.size)
        self.gpu.copy(flat[:done], pool[:done])
        while done < flat.size:  # twice as much with every copy
            more = min(done, flat.size - done)
            self.gpu.copy(flat[done:done + more], flat[:more])
            done += more
        return out

    def upload(self, array: np.ndarray):
        return self.gpu.upload(array)

    def copy_gb_per_s(self) -> float:
        """Of large buffers, bytes read plus bytes written: by the driver or by a kernel, whichever is faster; measured once."""
        if self._copy is None:
            nbytes = 1 << 20 if self.small else COPY_BYTES
            self._copy = max(copy_gb_per_s(self.timer, nbytes), self._kernel_copy_gb_per_s(nbytes))
        return self._copy

    def _kernel_copy_gb_per_s(self, nbytes: int) -> float:
        """By the kernel that gathers rows, all of them in their order. On an H200 the driver's copies reach 70 % of it."""
        t, d = nbytes // (2 * COPY_WIDTH), COPY_WIDTH
        index = self.upload(np.arange(t, dtype=np.int32))
        pairs = [(self.normal((t, d)), self.empty((t, d), self.t_dtype)) for _ in range(2)]
        timed = self.timer([lambda x=x, y=y: gather_rows(self.kernels(), x, index, y) for x, y in pairs])
        return 2e-6 * nbytes / timed.ms

    def release(self) -> None:
        """Gives memory that no array uses back to the device, for other processes."""
        self._pools.clear()
        gc.collect()
        self.gpu.settle()
