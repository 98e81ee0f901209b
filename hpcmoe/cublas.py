"""cuBLAS by its own functions, in the library that CuPy has loaded (cupy.cuda.cublas is what the caller hands in).

CuPy's gemmEx sets the handle's stream at each call: it refuses streams that capture, and cublasSetStream drops
the handle's workspace, so that products of a graph would allocate within it.
"""

from __future__ import annotations

import ctypes

import numpy as np

R_32F, R_16F, R_16BF = 0, 2, 14        # cudaDataType_t
COMPUTE_32F, GEMM_DEFAULT = 68, -1     # cublasComputeType_t, cublasGemmAlgo_t
OP_N, OP_T = 0, 1
FP32_SUMS = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: parts of a sum are not rounded to 16 bits
TYPES = {"e": R_16F, "H": R_16BF, "f": R_32F}  # by the letter of a NumPy type: its name costs microseconds
GROUPED = "cublasGemmGroupedBatchedEx"  # CUDA 12.5 and later
NOT_SUPPORTED = 15  # CUBLAS_STATUS_NOT_SUPPORTED


class Blas:
    """Products on handles that belong to one stream each."""

    def __init__(self, cublas):
        self.cublas = cublas
        library = ctypes.CDLL(cublas.__file__)  # a look-up there finds what CuPy's module is linked to
        i, p = ctypes.c_int, ctypes.c_void_p
        self._gemm, self._set_workspace = library.cublasGemmEx, library.cublasSetWorkspace_v2
        self._gemm.argtypes = [p, i, i, i, i, i, p, p, i, i, p, i, i, p, p, i, i, i, i]
        self._set_workspace.argtypes = [p, p, ctypes.c_size_t]
        self._grouped = getattr(library, GROUPED, None)
        if self._grouped is not None:
            self._grouped.argtypes = [*[p] * 8, i, p, p, i, p, p, p, i, p, i, p, i]
        self._scalars = np.array([1.0, 0.0], np.float32)
        self._one = self._scalars.ctypes.data
        self._zero = self._one + 4

    def handle(self, stream: int, workspace: int, nbytes: int) -> int:
        """A handle for one stream, with device memory that it alone uses."""
        handle = self.cublas.create()
        self.cublas.setStream(handle, stream)
        self.cublas.setMathMode(handle, FP32_SUMS)
        self._check(self._set_workspace(handle, workspace, nbytes))
        return handle

    def gemm(self, handle: int, x_tk, weight_nk, out_tn) -> None:
        """out = x W^T, contiguous, on the handle's stream."""
        (t, k), n, kind = x_tk.shape, weight_nk.shape[0], TYPES[x_tk.dtype.char]
        # cuBLAS counts columns first: out^T [n, t] = W [n, k] x^T
        self._check(self._gemm(handle, OP_T, OP_N, n, t, k, self._one, weight_nk.data.ptr, kind, k, x_tk.data.ptr, kind, k,
                               self._zero, out_tn.data.ptr, TYPES[out_tn.dtype.char], n, COMPUTE_32F, GEMM_DEFAULT))

    @property
    def has_grouped(self) -> bool:
        """Whether this cuBLAS has products of several groups in one call."""
        return self._grouped is not None

    def grouped(self, handle: int, shapes: list[tuple[int, int, int]], dtype: np.dtype, addresses) -> None:
        """out = x W^T, contiguous, for each group in one call, on the handle's stream.

        shapes: t, n, k of each group, none of them 0; dtype: of x, W and out, which must be one (cuBLAS's reference: sums in
        fp32 for fp16, bf16 and fp32). addresses int64 [3, groups], on the device: where each W, x and out begins, a multiple
        of 16 bytes; they are read when the stream comes to the call. All else is read now, on the host.
        """
        groups, kind = len(shapes), TYPES[dtype.char]
        t_g, n_g, k_g = np.array(shapes, np.int32).T
        same = np.ones(groups, np.int32)
        host = np.ascontiguousarray([OP_T * same, OP_N * same, n_g, t_g, k_g, same], np.int32)  # columns first, as in gemm
        scalars = np.repeat(self._scalars, groups)
        op_w, op_x, n, t, k, sizes = (host.ctypes.data + row * host.strides[0] for row in range(len(host)))
        weights, rows, outs = (addresses.data.ptr + row * addresses.strides[0] for row in range(3))
        one, zero = scalars.ctypes.data, scalars.ctypes.data + 4 * groups
        self._check(self._grouped(handle, op_w, op_x, n, t, k, one, weights, kind, k, rows, kind, k, zero, outs, kind, n,
                                  groups, sizes, COMPUTE_32F))

    def _check(self, status: int) -> None:
        if status:
            raise self.cublas.CUBLASError(status)
