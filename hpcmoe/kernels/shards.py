"""Launchers and twins of shards.cu: sums over tensor shards in a fixed order, and the ways in and out of 16 bits."""

from __future__ import annotations

import numpy as np

from hpcmoe.model.dtypes import from_fp32, name_of, to_fp32

THREADS = 128  # of a block


def sum_parts(m, parts_jtd, out_td) -> None:
    """out T [t, d] = the sum over j of parts T [j, t, d], added in fp32 in the order of j, rounded once."""
    _launch(m, "sum", parts_jtd, out_td, len(parts_jtd))


def narrow(m, x_td, out_td) -> None:
    """out T [t, d] = x fp32 [t, d]."""
    _launch(m, "narrow", x_td, out_td, 1)


def add_rows(m, y_td, x_td) -> None:
    """x_td fp32 [t, d] += y T [t, d]."""
    _launch(m, "add", y_td, x_td, 1)


def place_columns(m, in_nw, out_nv, first: int) -> None:
    """out[:, first:first + w] = in, fp32: one shard's columns among all."""
    if in_nw.size:
        rows, width = in_nw.shape
        m.launch("shards.cu", "columns", (-(-in_nw.size // THREADS),), (THREADS,),
                 (in_nw, out_nv, np.int32(rows), np.int32(width), np.int32(out_nv.shape[1]), np.int32(first)))


def _launch(m, name: str, source, target, parts: int) -> None:
    count = target.size
    if count:
        wide = 4 if count % 4 == 0 else 1
        m.launch("shards.cu", f"{name}_{wide}", (-(-count // (wide * THREADS)),), (THREADS,),
                 (source, target, np.int32(parts), np.int32(count)))


def sum_parts_twin(parts_jtd, out_td) -> None:
    """sum_parts on host arrays."""
    total_td = np.zeros(out_td.shape, np.float32)
    for part_td in parts_jtd:
        total_td += to_fp32(part_td)
    out_td[...] = from_fp32(total_td, name_of(out_td.dtype))


def place_columns_twin(in_nw, out_nv, first: int) -> None:
    """place_columns on host arrays."""
    out_nv[:, first:first + in_nw.shape[1]] = in_nw


def narrow_twin(x_td, out_td) -> None:
    """narrow on host arrays."""
    out_td[...] = from_fp32(x_td, name_of(out_td.dtype))


def add_rows_twin(y_td, x_td) -> None:
    """add_rows on host arrays."""
    x_td += to_fp32(y_td)
