"""As cupy.cuda.cublas: C = alpha op(A) op(B) + beta C, in columns, 16-bit or 32-bit floats, summed in fp32.

__file__ is a library with cuBLAS's own functions, as CuPy's module is one that is linked to it; they come back here.
As in CuPy, gemmEx sets the handle's stream to the current one, and refuses one that captures.
"""

import ctypes
import hashlib
import itertools
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from .. import _memory, _stream

CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_OP_C = range(3)
CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32 = 68, 77
CUBLAS_GEMM_DEFAULT, CUBLAS_GEMM_DEFAULT_TENSOR_OP = -1, 99
CUBLAS_DEFAULT_MATH, CUBLAS_POINTER_MODE_HOST = 0, 0
R_32F, R_16F, R_16BF = 0, 2, 14
TYPES = {R_32F: np.dtype(np.float32), R_16F: np.dtype(np.float16), R_16BF: np.dtype(np.uint16)}


class CUBLASError(RuntimeError):
    """As cupy.cuda.cublas.CUBLASError."""

    NAMES = {7: "CUBLAS_STATUS_INVALID_VALUE", 14: "CUBLAS_STATUS_INTERNAL_ERROR", 15: "CUBLAS_STATUS_NOT_SUPPORTED"}

    def __init__(self, status: int, detail: str = ""):
        self.status = status
        super().__init__(self.NAMES[status] + (f" ({detail})" if detail else ""))


_handles = itertools.count(0xB1A5, 8)
_streams: dict = {}  # of handles
_workspaces: dict = {}


def create() -> int:
    _stream.refuse_captures("cublasCreate")
    handle = next(_handles)
    _streams[handle] = _stream.Stream.null
    return handle


def destroy(handle: int) -> None:
    """Nothing is kept."""


def getVersion(handle: int) -> int:
    return 130000


def setStream(handle: int, stream: int) -> None:
    if _stream.by_pointer[stream].is_capturing():
        raise NotImplementedError("CuPy makes no cuBLAS call on a stream that captures")
    _streams[handle] = _stream.by_pointer[stream]
    _workspaces.pop(handle, None)


def setMathMode(handle: int, mode: int) -> None:
    """Without effect."""


def gemmEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, computeType, algo):
    """alpha, beta: addresses of floats on the host, read now. A, B, C: device addresses."""
    setStream(handle, _stream.get_current_stream().ptr)
    _gemm(handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, computeType, algo)


def _gemm(handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, computeType, algo):
    """cublasGemmEx, on the handle's stream; what captures must have a workspace, so that nothing is allocated."""
    stream = _streams[handle]
    if stream.is_capturing() and handle not in _workspaces:
        raise CUBLASError(15, "a product in a graph without a workspace of its own")
    if Atype != Btype or Ctype not in (Atype, R_32F) or Atype not in TYPES or computeType not in (R_32F, 68, 77):
        raise CUBLASError(15, f"types {Atype}, {Btype}, {Ctype}, compute type {computeType}")
    if min(m, n, k) < 0:
        raise CUBLASError(7, f"m, n, k = {m}, {n}, {k}")
    if m == 0 or n == 0:
        return
    factor, keep = (ctypes.c_float.from_address(int(p)).value for p in (alpha, beta))
    a_mk = _matrix("A", A, Atype, m, k, lda, transa)
    b_kn = _matrix("B", B, Btype, k, n, ldb, transb)
    c_mn = _matrix("C", C, Ctype, m, n, ldc, CUBLAS_OP_N)

    _stream.put(stream, lambda: _multiply(factor, a_mk, Atype, b_kn, keep, c_mn, Ctype), "gemmEx")


def _multiply(factor: float, a_mk, kind: int, b_kn, keep: float, c_mn, out_kind: int) -> None:
    """c_mn = factor a_mk b_kn + keep c_mn, now."""
    result = np.float32(factor) * (_fp32(a_mk, kind) @ _fp32(b_kn, kind))
    if keep:
        result += np.float32(keep) * _fp32(c_mn, out_kind)
    with np.errstate(over="ignore"):
        c_mn[...] = _bf16(result) if out_kind == R_16BF else result.astype(c_mn.dtype)


def _grouped(handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, groups, sizes, compute):
    """cublasGemmGroupedBatchedEx. A, B, C: arrays of addresses in device memory, read when the stream comes to it; all other
    arrays are the host's, read now. Refused in a capture: cuBLAS's reference does not say whether it can be there."""
    if _streams[handle].is_capturing():
        raise CUBLASError(15, "grouped products in a graph")
    if Atype not in TYPES or not Atype == Btype == Ctype or compute != 68:
        raise CUBLASError(15, f"types {Atype}, {Btype}, {Ctype}, compute type {compute}")
    if groups < 0 or (groups and 0 in (transa, transb, m, n, k, alpha, lda, ldb, beta, ldc, sizes)):
        raise CUBLASError(7, f"{groups} groups, or an array is missing")
    ints = [np.array((ctypes.c_int * groups).from_address(p)) for p in (transa, transb, m, n, k, lda, ldb, ldc, sizes)]
    if any((row < 0).any() for row in ints):
        raise CUBLASError(7, f"a number below 0 in {ints}")
    each = np.repeat(np.stack(ints[:-1]), ints[-1], axis=1).T.tolist()  # one row of numbers per problem
    scalars = np.repeat([(ctypes.c_float * groups).from_address(p) for p in (alpha, beta)], ints[-1], axis=1).T.tolist()
    for pointers in (A, B, C):
        _memory.check_operand(int(pointers), 8 * len(each), "device")

    def run() -> None:
        places = [(ctypes.c_uint64 * len(each)).from_address(_memory.shadow(int(p), 8 * len(each))) for p in (A, B, C)]
        for (op_a, op_b, rows, columns, inner, lead_a, lead_b, lead_c), (factor, keep), (a, b, c) in zip(each, scalars, zip(*places)):
            if rows and columns:
                for pointer in (a, b, c):
                    _check_place(pointer, inner * TYPES[Atype].itemsize)
                _multiply(factor, _matrix("A", a, Atype, rows, inner, lead_a, op_a), Atype,
                          _matrix("B", b, Btype, inner, columns, lead_b, op_b), keep,
                          _matrix("C", c, Ctype, rows, columns, lead_c, CUBLAS_OP_N), Ctype)

    _stream.put(_streams[handle], run, "gemmGroupedBatchedEx")


def _check_place(pointer: int, inner_bytes: int) -> None:
    """A matrix of a group lies in device memory, aligned as cuBLAS's reference wants it for 16-bit types. inner_bytes: of k values."""
    _memory.check_operand(pointer, 1, "device")
    for multiple in (16, 4):
        if inner_bytes % multiple == 0 and pointer % multiple:
            raise _stream.CUDARuntimeError(716, f"a matrix at {pointer:#x}, expected a multiple of {multiple}")


def _set_workspace(handle: int, pointer: int, nbytes: int) -> None:
    _memory.check_operand(int(pointer), nbytes, "device")
    if pointer % 256:
        raise CUBLASError(7, f"a workspace at {pointer:#x}")
    _workspaces[handle] = pointer


def _matrix(name: str, pointer: int, kind: int, rows: int, columns: int, leading: int, op: int) -> np.ndarray:
    """The shadow of op(matrix), rows x columns, which is stored by columns `leading` elements apart."""
    dtype = TYPES[kind]
    stored = (rows, columns) if op == CUBLAS_OP_N else (columns, rows)
    if leading < max(1, stored[0]):
        raise CUBLASError(7, f"leading dimension {leading} of {name} with {stored[0]} rows")
    if 0 in stored:
        return np.zeros((rows, columns), dtype)
    nbytes = ((stored[1] - 1) * leading + stored[0]) * dtype.itemsize
    _memory.check_operand(int(pointer), nbytes, "any")
    at = _memory.shadow(int(pointer), nbytes) if _memory.on_device(int(pointer)) else int(pointer)
    matrix = np.ndarray(stored, dtype, (ctypes.c_ubyte * nbytes).from_address(at), strides=(dtype.itemsize, leading * dtype.itemsize))
    return matrix if op == CUBLAS_OP_N else matrix.T


def _fp32(array: np.ndarray, kind: int) -> np.ndarray:
    return (array.astype(np.uint32) << 16).view(np.float32) if kind == R_16BF else array.astype(np.float32)


def _bf16(array: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, ties to even; NaN stays NaN."""
    bits = array.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


# ---------------------------------------------------------------- cuBLAS's own functions
_SOURCE = """
typedef int (*gemm_t)(void *, int, int, int, int, int, void *, void *, int, int, void *, int, int, void *, void *, int, int, int, int);
typedef int (*grouped_t)(void *, void *, void *, void *, void *, void *, void *, void *, int, void *, void *, int, void *, void *,
                         void *, int, void *, int, void *, int);
typedef int (*workspace_t)(void *, void *, unsigned long);
gemm_t gemm;
grouped_t grouped;
workspace_t workspace;
int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, void *x, void *a, int at, int la, void *b, int bt, int lb, void *y,
                 void *c, int ct, int lc, int compute, int algo) {
    return gemm(h, ta, tb, m, n, k, x, a, at, la, b, bt, lb, y, c, ct, lc, compute, algo);
}
int cublasGemmGroupedBatchedEx(void *h, void *ta, void *tb, void *m, void *n, void *k, void *x, void *a, int at, void *la, void *b,
                               int bt, void *lb, void *y, void *c, int ct, void *lc, int groups, void *sizes, int compute) {
    return grouped(h, ta, tb, m, n, k, x, a, at, la, b, bt, lb, y, c, ct, lc, groups, sizes, compute);
}
int cublasSetWorkspace_v2(void *h, void *p, unsigned long n) { return workspace(h, p, n); }
"""


def _library() -> str:
    """The compiled source; kept under a hash of it."""
    folder = Path(tempfile.gettempdir()) / f"hpcmoe-fakecublas-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{hashlib.sha256(_SOURCE.encode()).hexdigest()[:20]}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            Path(work, "cublas.c").write_text(_SOURCE)
            subprocess.run([os.environ.get("CC", "cc"), "-O1", "-fPIC", "-shared", "-w", Path(work, "cublas.c"), "-o",
                            Path(work, "cublas.so")], check=True)
            os.replace(Path(work, "cublas.so"), made)
    return str(made)


def _status(func):
    """func as C calls it: errors become numbers."""
    def call(*args) -> int:
        try:
            func(*(arg or 0 for arg in args))
        except CUBLASError as error:
            return error.status
        except _stream.CUDARuntimeError as error:
            print(f"look-alike of cuBLAS: {error}", flush=True)
            return 14
        return 0
    return call


__file__ = _library()
_i, _p = ctypes.c_int, ctypes.c_void_p
_callbacks = {
    "gemm": ctypes.CFUNCTYPE(_i, _p, _i, _i, _i, _i, _i, _p, _p, _i, _i, _p, _i, _i, _p, _p, _i, _i, _i, _i)(_status(_gemm)),
    "grouped": ctypes.CFUNCTYPE(_i, *[_p] * 8, _i, _p, _p, _i, _p, _p, _p, _i, _p, _i, _p, _i)(_status(_grouped)),
    "workspace": ctypes.CFUNCTYPE(_i, _p, _p, ctypes.c_ulong)(_status(_set_workspace))}
for _name, _callback in _callbacks.items():
    ctypes.c_void_p.in_dll(ctypes.CDLL(__file__), _name).value = ctypes.cast(_callback, ctypes.c_void_p).value
