"""The weighted sum of the experts' rows, added to the residual stream or by itself, in the order of the choices."""

from __future__ import annotations

import numpy as np

from hpcmoe.kernels.chunks import launch_chunks
from hpcmoe.kernels.loader import valid
from hpcmoe.model import route
from hpcmoe.model.dtypes import from_fp32, name_of, to_fp32


def merge(m, x_td, y_sd, weight_tk, slot_tk, *, some: bool = False, rows=None) -> None:
    """x_td += weight_tk * y_sd[slot_tk], one choice after the other, in place.

    x_td fp32 [R, d], y_sd T [S, d], weight_tk fp32 and slot_tk int32 [R, k] with slots below S, with `some` also below 0:
    such a choice adds nothing. rows int32 [1]: only so many rows of x_td.
    """
    launch_chunks(m, "merge_some" if some else "merge", x_td.shape, 4, 8, (x_td, y_sd, weight_tk, slot_tk, rows),
                  np.int32(slot_tk.shape[1]), file="merge.cu")


def sum_rows(m, out_td, y_sd, weight_tk, slot_tk) -> None:
    """out_td T [R, d] = what merge(some) adds, summed in fp32 and rounded once."""
    launch_chunks(m, "sum_some", out_td.shape, 4, 8, (out_td, y_sd, weight_tk, slot_tk, None), np.int32(slot_tk.shape[1]),
                  file="merge.cu")


def merge_twin(x_td, y_sd, weight_tk, slot_tk, *, some: bool = False, rows=None) -> None:
    """merge on host arrays."""
    n = valid(rows, len(x_td))
    (route.add_chosen if some else route.merge)(x_td[:n], to_fp32(y_sd), weight_tk[:n], slot_tk[:n])


def sum_rows_twin(out_td, y_sd, weight_tk, slot_tk) -> None:
    """sum_rows on host arrays."""
    total_td = np.zeros(out_td.shape, np.float32)
    merge_twin(total_td, y_sd, weight_tk, slot_tk, some=True)
    out_td[...] = from_fp32(total_td, name_of(out_td.dtype))
