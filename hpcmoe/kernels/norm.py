"""RMS norm and layer norm of the residual stream, with the residual add that comes before it.

Letters as in docs/letters.md; R rows are in the arrays, d is the model width, T the 16-bit type.
"""

from __future__ import annotations

import numpy as np

from hpcmoe.kernels.loader import valid
from hpcmoe.model.dense import layer_norm, rms_norm
from hpcmoe.model.dtypes import from_fp32, name_of, to_fp32

KINDS = {"rms": 0, "layer": 1}


def norm(m, x_td, out_td, weight_d, *, eps: float, kind: str = "rms", bias_d=None, add_td=None, add_bias_d=None,
         row_n=None, rows=None) -> None:
    """out_td T = norm(x_td) * weight_d (+ bias_d); x_td fp32 [R, d], weight_d and bias_d fp32 [d].

    add_td T [R, d]: x_td += add_td (+ add_bias_d fp32 [d]) first, in place. row_n int32 [N]:
    out_td [N, d] are the norms of rows row_n of x_td, and nothing is added. rows int32 [1]: only so
    many rows of out_td. kind "rms" (Zhang, Sennrich, arXiv 1910.07467) or "layer" (Ba et al., arXiv
    1607.06450). ValueError: row_n and add_td at once.
    """
    _check(add_td, row_n)
    most, width = out_td.shape
    if most == 0:
        return
    kernel, threads = _shape(width)
    m.launch("norm.cu", kernel, (most,), (threads,),
             (x_td, out_td, weight_d, bias_d, add_td, add_bias_d, row_n, rows, np.int32(most), np.int32(width),
              np.float32(eps), np.int32(KINDS[kind])))


def _shape(width: int) -> tuple[str, int]:
    """The kernel for a width, and its threads: whole warps, each thread with 2 or 4 times 4 columns in registers."""
    for each in (2, 4):
        threads = -(-width // (4 * each * 32)) * 32
        if width % 4 == 0 and threads <= 256 * each:
            return f"norm_{each}", threads
    return "norm_any", min(1024, -(-width // 32) * 32)


def _check(add_td, row_n) -> None:
    if add_td is not None and row_n is not None:
        raise ValueError("norm: rows chosen by row_n and a residual add at once")


def norm_twin(x_td, out_td, weight_d, *, eps: float, kind: str = "rms", bias_d=None, add_td=None, add_bias_d=None,
              row_n=None, rows=None) -> None:
    """norm on host arrays."""
    _check(add_td, row_n)
    n = valid(rows, len(out_td))
    if add_td is not None:
        x_td[:n] += to_fp32(add_td[:n])
        if add_bias_d is not None:
            x_td[:n] += add_bias_d
    x_nd = x_td[:n] if row_n is None else x_td[row_n[:n]]
    if kind == "layer":
        y_nd = layer_norm(x_nd, weight_d, np.float32(0.0) if bias_d is None else bias_d, eps)
    else:
        y_nd = rms_norm(x_nd, weight_d, eps)
        y_nd = y_nd if bias_d is None else y_nd + bias_d
    out_td[:n] = from_fp32(y_nd, name_of(out_td.dtype))
