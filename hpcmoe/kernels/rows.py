"""Rows of any type, gathered from or scattered to the places that an index names."""

from __future__ import annotations

import math

import numpy as np

from hpcmoe.kernels.loader import valid

THREADS = 128  # of a block
PER_THREAD = 4  # units, as GROUPS in rows.cu


def gather_rows(m, source_id, index_i, out_id, *, rows=None) -> None:
    """out_id[i] = source_id[index_i[i]].

    source_id and out_id: of one dtype and row shape, C-contiguous, memory on a 16-byte boundary;
    index_i int32, one per row of out_id. rows int32 [1]: only so many of the index.
    """
    _copy(m, source_id, index_i, out_id, rows, scatter=False)


def scatter_rows(m, source_id, index_i, out_id, *, rows=None) -> None:
    """out_id[index_i[i]] = source_id[i], no place twice; arrays as above, index_i one per row of source_id."""
    _copy(m, source_id, index_i, out_id, rows, scatter=True)


def _copy(m, source_id, index_i, out_id, rows, *, scatter: bool) -> None:
    if source_id.dtype != out_id.dtype or source_id.shape[1:] != out_id.shape[1:]:
        raise ValueError(f"rows of {source_id.dtype} {source_id.shape[1:]} into {out_id.dtype} {out_id.shape[1:]}")
    most, row_bytes = len(index_i), math.prod(source_id.shape[1:]) * source_id.dtype.itemsize
    if most == 0 or row_bytes == 0:
        return
    unit = next(size for size in (16, 4, 1) if row_bytes % size == 0)
    width = row_bytes // unit
    across = min(THREADS, 1 << max(0, -(-width // PER_THREAD) - 1).bit_length())  # threads along a row
    chunks, down = -(-width // (across * PER_THREAD)), THREADS // across
    m.launch("rows.cu", f"rows_{unit}", (-(-most // down) * chunks,), (across, down),
             (source_id, index_i, out_id, rows, np.int32(most), np.int32(width), np.int32(chunks), np.int32(scatter)))


def gather_rows_twin(source_id, index_i, out_id, *, rows=None) -> None:
    """gather_rows on host arrays."""
    n = valid(rows, len(index_i))
    out_id[:n] = source_id[index_i[:n]]


def scatter_rows_twin(source_id, index_i, out_id, *, rows=None) -> None:
    """scatter_rows on host arrays."""
    n = valid(rows, len(index_i))
    out_id[index_i[:n]] = source_id[:n]
