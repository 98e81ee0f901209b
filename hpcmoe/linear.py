"""Products with a fixed weight: an object owns the weight in its best layout, planned once and run many times.

Backends: "numpy" (and any array module with NumPy's interface, e.g. CuPy: the weight's own), and "onednn",
which packs weights and can compute in bf16. Letters: t rows, n outputs, k inputs; in a gated unit
d inputs and f hidden outputs.
"""

from __future__ import annotations

import ctypes
import math
import time

import numpy as np

from hpcmoe import memory, onednn
from hpcmoe.device import xp_of
from hpcmoe.errors import UserError
from hpcmoe.packed import PackedBias, PackedWeight, slabs, widen, zeroed
from hpcmoe.products import layout, rounder

NAMES = ("numpy", "onednn")
DTYPES = ("fp32", "bf16")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def backends() -> dict[str, str]:
    """Backend name -> "" where it can be used here, else the reason why not."""
    return {"numpy": "", "onednn": _unavailable("fp32")}


def _unavailable(dtype: str) -> str:
    try:
        layout(onednn.load(), 64, 64, dtype)
    except onednn.Unavailable as error:
        return str(error)
    return ""


def choose(name: str = "auto", dtype: str = "fp32") -> Backend:
    """The backend of that name; "auto": oneDNN where it can be used, else NumPy.

    dtype: the arithmetic's inputs, "fp32" or "bf16" (sums are fp32 in both). UserError with the
    reason where name or dtype cannot be had on this machine.
    """
    if name not in ("auto", *NAMES):
        raise UserError(f"backend = {name!r}: expected one of auto, {', '.join(NAMES)}")
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: expected one of {', '.join(DTYPES)} on a CPU")
    if name == "numpy" or (name == "auto" and dtype == "fp32" and _unavailable("fp32")):
        if dtype != "fp32":
            raise UserError(f"dtype = {dtype!r}: the numpy backend computes in fp32 only; expected fp32, or backend onednn")
        return NumpyBackend()
    reason = _unavailable(dtype)
    if reason:
        raise UserError(f"backend = {name!r}, dtype = {dtype!r}: {reason}")
    return OneDnnBackend(dtype)


class Linear:
    """y [t, n] = x [t, k] W^T + b. `nbytes`: of the weight as it is owned."""

    n: int
    k: int
    nbytes: int

    def __call__(self, x_tk, out=None):
        """fp32 rows for fp32 rows, any number of them; rows of uint16 are read as bf16.

        out: where to put y, contiguous fp32 [t, n]; ValueError for any other.
        """
        raise NotImplementedError


class Backend:
    """What makes products: name, version of its library, dtype of its inputs, threads it uses."""

    name: str
    version: str
    dtype: str
    threads: int

    def linear(self, weight_nk, bias_n=None) -> Linear:
        """Owns a weight as checkpoints store it: fp32, fp16, or bf16 bits in uint16; the source may go afterwards."""
        raise NotImplementedError

    def glu(self, gate_fd, up_fd, act: str = "silu") -> Linear:
        """The gated unit h [t, f] = act(x W_gate^T) * (x W_up^T); act: silu, gelu, gelu_tanh or relu."""
        raise NotImplementedError


def _check_activation(act: str) -> None:
    if act not in ACTIVATIONS:
        raise UserError(f"activation = {act!r}: expected one of {', '.join(ACTIVATIONS)}")


# ---------------------------------------------------------------- arrays: NumPy, CuPy
CHUNK = 1 << 16  # elements of one elementwise pass: they stay in a core's caches


class NumpyBackend(Backend):
    name, dtype = "numpy", "fp32"

    def __init__(self):
        self.version = np.__version__
        self.threads = _blas_threads()

    def linear(self, weight_nk, bias_n=None) -> Linear:
        return ArrayLinear(weight_nk, bias_n)

    def glu(self, gate_fd, up_fd, act: str = "silu") -> Linear:
        _check_activation(act)
        return ArrayGlu(ArrayLinear(gate_fd), ArrayLinear(up_fd), act)


class ArrayLinear(Linear):
    """A product by the array module's own matmul.

    On a CPU the weight is kept as [k, n]: BLAS repacks it at every call, and for few rows does so
    faster from there (1024 x 7168, 16 rows: 54 instead of 37 GFLOP/s). On a device it stays as it is.
    """

    def __init__(self, weight_nk, bias_n=None):
        self.n, self.k = weight_nk.shape
        if isinstance(weight_nk, np.ndarray):
            self._weight_kn = _transposed(weight_nk)
        else:
            self._weight_kn = weight_nk.T
        self._bias_n = None if bias_n is None else _bias(bias_n)
        self.nbytes = self._weight_kn.nbytes

    def __call__(self, x_tk, out=None):
        xp = xp_of(x_tk)
        x_tk = _rows(x_tk, self.k)
        y_tn = xp.matmul(x_tk, self._weight_kn, out=_output(xp, out, len(x_tk), self.n))
        if self._bias_n is not None:
            y_tn += self._bias_n
        return y_tn


class ArrayGlu(Linear):
    def __init__(self, gate: ArrayLinear, up: ArrayLinear, act: str):
        self.gate, self.up, self.act = gate, up, act
        self.n, self.k, self.nbytes = up.n, up.k, gate.nbytes + up.nbytes

    def __call__(self, x_td, out=None):
        gate_tf, h_tf = self.gate(x_td), self.up(x_td, out=out)
        step = max(1, CHUNK // max(self.n, 1)) if isinstance(h_tf, np.ndarray) else len(h_tf) or 1
        for t0 in range(0, len(h_tf), step):
            h_tf[t0:t0 + step] *= activate(self.act, gate_tf[t0:t0 + step])
        return h_tf


def activate(act: str, x):
    """silu x/(1+e^-x); gelu x Phi(x); gelu_tanh (Hendrycks, Gimpel, arXiv 1606.08415, eq. 2); relu."""
    xp = xp_of(x)
    if act == "relu":
        return xp.maximum(x, 0)
    if act == "silu":
        with np.errstate(over="ignore"):  # e^-x = inf gives the right 0
            return x / (1 + xp.exp(-x))
    if act == "gelu_tanh":
        return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + _erf(x * math.sqrt(0.5)))


def _erf(x):
    """Error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26); NumPy has none."""
    xp = xp_of(x)
    size = xp.abs(x)
    t = 1 / (1 + 0.3275911 * size)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return xp.copysign(1 - series * xp.exp(-size * size), x)


def _transposed(weight_nk: np.ndarray) -> np.ndarray:
    """fp32 [k, n], by tiles: a few rows at a time keep both sides in the caches."""
    n, k = weight_nk.shape
    weight_kn = np.empty((k, n), np.float32)
    tile = np.empty((8, k), np.float32)
    for n0 in range(0, n, 8):
        rows = min(8, n - n0)
        widen(tile[:rows], weight_nk[n0:n0 + rows])
        weight_kn[:, n0:n0 + rows] = tile[:rows].T
    return weight_kn


# ---------------------------------------------------------------- oneDNN
class OneDnnBackend(Backend):
    name = "onednn"

    def __init__(self, dtype: str):
        self.library, self.dtype = onednn.load(), dtype
        self.version = self.library.version
        self._scratch: dict[str, np.ndarray] = {}

    @property
    def threads(self) -> int:
        return self.library.threads

    def linear(self, weight_nk, bias_n=None) -> Linear:
        return PackedLinear(self, weight_nk, bias_n)

    def glu(self, gate_fd, up_fd, act: str = "silu") -> Linear:
        _check_activation(act)
        return PackedGlu(self, gate_fd, up_fd, act)

    def scratch(self, name: str, nbytes: int) -> int:
        """Address of working memory that lives until the next call of this name; grows, and is never given back."""
        if name not in self._scratch or self._scratch[name].nbytes < nbytes:
            self._scratch[name] = zeroed(nbytes)
        return self._scratch[name].ctypes.data

    def inputs(self, weight: PackedWeight, x_tk: np.ndarray) -> list[int]:
        """Addresses of x for each part of the weight, rounded to bf16 or cut where need be."""
        rows, k = x_tk.shape
        if self.dtype == "bf16" and x_tk.dtype == np.float32:
            rounded = self.scratch("x", rows * k * 2)
            rounder(self.library, k).run(rows, x_tk.ctypes.data, rounded)
            return [rounded]
        if len(weight.parts) == 1:
            return [x_tk.ctypes.data]
        self.scratch("x", rows * k * 4)
        flat = self._scratch["x"].view(np.float32)
        ends = [part.k0 for part in weight.parts[1:]] + [k]
        for part, end in zip(weight.parts, ends):
            cut = flat[rows * part.k0:rows * end].reshape(rows, end - part.k0)
            np.copyto(cut, x_tk[:, part.k0:end])
        return [flat.ctypes.data + 4 * rows * part.k0 for part in weight.parts]


class PackedLinear(Linear):
    def __init__(self, backend: OneDnnBackend, weight_nk, bias_n=None):
        self.backend = backend
        self.weight = PackedWeight(backend.library, weight_nk, backend.dtype)
        self.n, self.k, self.nbytes = self.weight.n, self.weight.k, self.weight.nbytes
        self._bias = PackedBias(backend.library, self.weight, _bias(bias_n)) if bias_n is not None else None
        self._products = self.weight.products(bias_n is not None, ())

    def __call__(self, x_tk, out=None):
        x_tk = _rows(x_tk, self.k, self.backend.dtype)
        out = _output(np, out, len(x_tk), self.n)
        y, step, bias = out.ctypes.data, out.strides[0], self._bias.memory if self._bias else 0
        with self.backend.library.lock:
            for t0, t1 in slabs(len(x_tk), self.weight.slab):
                xs = self.backend.inputs(self.weight, x_tk[t0:t1])
                for part, product, x in zip(self.weight.parts, self._products, xs):
                    product.run(t1 - t0, x, part.memory, y + t0 * step, bias)
        return out


class PackedGlu(Linear):
    """act and the product of the two halves are fused into the matrix products; slabs keep the gate in the caches."""

    def __init__(self, backend: OneDnnBackend, gate_fd, up_fd, act: str):
        if gate_fd.shape != up_fd.shape:
            raise ValueError(f"gate {gate_fd.shape} and up {up_fd.shape} differ")
        self.backend = backend
        self.gate = PackedWeight(backend.library, gate_fd, backend.dtype)
        self.up = PackedWeight(backend.library, up_fd, backend.dtype)
        self.n, self.k, self.nbytes = self.up.n, self.up.k, self.gate.nbytes + self.up.nbytes
        self._gate_products = self.gate.products(False, (act,))
        self._up_products = self.up.products(False, ("mul",))

    def __call__(self, x_td, out=None):
        x_td = _rows(x_td, self.k, self.backend.dtype)
        out = _output(np, out, len(x_td), self.n)
        h, step = out.ctypes.data, out.strides[0]
        with self.backend.library.lock:
            for t0, t1 in slabs(len(x_td), self.up.slab):
                rows = t1 - t0
                xs = self.backend.inputs(self.up, x_td[t0:t1])
                gate = self.backend.scratch("gate", rows * self.n * 4)
                for part, product, x in zip(self.gate.parts, self._gate_products, xs):
                    product.run(rows, x, part.memory, gate)
                for part, product, x in zip(self.up.parts, self._up_products, xs):
                    product.run(rows, x, part.memory, h + t0 * step, other=gate)
        return out


# ---------------------------------------------------------------- what both share
def _rows(x_tk, k: int, dtype: str = "fp32"):
    """x as contiguous rows that a product takes: fp32, or bf16 bits where the product computes in bf16."""
    if x_tk.ndim != 2 or x_tk.shape[1] != k:
        raise ValueError(f"rows of shape {x_tk.shape}: expected [t, {k}]")
    if x_tk.dtype == np.uint16 and dtype == "fp32":
        x_tk = (x_tk.astype(np.uint32) << 16).view(np.float32)
    if not isinstance(x_tk, np.ndarray):
        return x_tk
    return np.ascontiguousarray(x_tk, dtype=None if x_tk.dtype == np.uint16 else np.float32)


def _output(xp, out, rows: int, n: int):
    if out is None:
        return xp.empty((rows, n), np.float32)
    if out.shape != (rows, n) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} of shape {out.shape}: expected contiguous float32 [{rows}, {n}]")
    return out


def _bias(bias_n):
    if not isinstance(bias_n, np.ndarray):
        return bias_n
    wide_n = np.empty((1, len(bias_n)), np.float32)
    widen(wide_n, bias_n[None])
    return wide_n[0]


def _blas_threads() -> int:
    """Threads of the BLAS that NumPy is linked with, where it says; else the cores of this process."""
    blas = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    for name in ("scipy_openblas_get_num_threads64_", "scipy_openblas_get_num_threads", "openblas_get_num_threads64_",
                 "openblas_get_num_threads", "MKL_Get_Max_Threads"):
        if hasattr(blas, name):
            return getattr(blas, name)()
    return memory.cores()


def peak(backend: Backend, rows: int = 512, n: int = 7168, k: int = 1024, seconds: float = 0.3) -> float:
    """GFLOP/s of the fastest of the products [rows, k] x [k, n] that fit in the time (three at least)."""
    product = backend.linear(np.full((n, k), 0.01, np.float32))
    x_tk, y_tn = np.full((rows, k), 0.01, np.float32), np.empty((rows, n), np.float32)
    best, runs, end = math.inf, 0, time.perf_counter() + seconds
    while runs < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        product(x_tk, out=y_tn)
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return 2e-9 * rows * n * k / best
