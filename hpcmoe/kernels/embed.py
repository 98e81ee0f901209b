"""Rows of the embedding table as the residual stream."""

from __future__ import annotations

import numpy as np

from hpcmoe.kernels.chunks import launch_chunks
from hpcmoe.kernels.loader import valid
from hpcmoe.model.dtypes import to_fp32


def embed(m, table_vd, token_t, x_td, *, first_id: int = 0, rows=None) -> None:
    """x_td fp32 [R, d] = table_vd T [v, d] at token_t int32 [R]; rows int32 [1]: only so many rows.

    The table begins with the token id first_id; rows of ids that it does not hold are zero.
    """
    launch_chunks(m, "embed", x_td.shape, 4, 16, (table_vd, token_t, x_td, rows), np.int32(first_id), np.int32(len(table_vd)))


def embed_twin(table_vd, token_t, x_td, *, first_id: int = 0, rows=None) -> None:
    """embed on host arrays."""
    n = valid(rows, len(x_td))
    id_t = token_t[:n] - first_id
    here_t = (id_t >= 0) & (id_t < len(table_vd))
    x_td[:n] = 0
    x_td[:n][here_t] = to_fp32(table_vd[id_t[here_t]])
