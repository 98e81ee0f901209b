"""Products by an array module's own matmul: NumPy, or any with its interface, e.g. CuPy (the weight's own module)."""

from __future__ import annotations

import copy
import ctypes
import math

import numpy as np

from hpcmoe import memory
from hpcmoe.device import xp_of
from hpcmoe.products.base import Backend, Linear, check_activation, output, rows_of
from hpcmoe.products.widen import bias_fp32, widen

CHUNK = 1 << 16  # elements of one elementwise pass: they stay in a core's caches


class NumpyBackend(Backend):
    name, dtype = "numpy", "fp32"

    def __init__(self):
        self.version = np.__version__
        self.threads = _blas_threads()

    def linear(self, weight_nk, bias_n=None) -> Linear:
        return ArrayLinear(weight_nk, bias_n)

    def glu(self, gate_fd, up_fd, act: str = "silu") -> Linear:
        check_activation(act)
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
        self._bias_n = None if bias_n is None else bias_fp32(bias_n)
        self.nbytes = self._weight_kn.nbytes

    def __call__(self, x_tk, out=None):
        xp = xp_of(x_tk)
        x_tk = rows_of(x_tk, self.k)
        y_tn = xp.matmul(x_tk, self._weight_kn, out=output(xp, out, len(x_tk), self.n))
        if self._bias_n is not None:
            y_tn += self._bias_n
        return y_tn

    def weights(self) -> list[np.ndarray]:
        return [self._weight_kn.reshape(-1).view(np.uint8)]

    def clone(self) -> "ArrayLinear":
        twin = copy.copy(self)
        twin._weight_kn = self._weight_kn.copy()
        return twin


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

    def weights(self) -> list[np.ndarray]:
        return self.gate.weights() + self.up.weights()

    def clone(self) -> "ArrayGlu":
        return ArrayGlu(self.gate.clone(), self.up.clone(), self.act)


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


def _blas_threads() -> int:
    """Threads of the BLAS that NumPy is linked with, where it says; else the cores of this process."""
    blas = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    for name in ("scipy_openblas_get_num_threads64_", "scipy_openblas_get_num_threads", "openblas_get_num_threads64_",
                 "openblas_get_num_threads", "MKL_Get_Max_Threads"):
        if hasattr(blas, name):
            return getattr(blas, name)()
    return memory.cores()
