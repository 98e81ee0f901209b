"""How rows are cut into blocks, for kernels whose columns do not depend on each other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

THREADS = 128  # of a block, at most


class Chunks(NamedTuple):
    """blocks per row, and threads of each block."""

    per_row: int
    threads: int


def chunks_of(columns: int, per_thread: int) -> Chunks:
    """Cuts a row of `columns` into blocks of whole warps, `per_thread` columns per thread: few idle threads."""
    needed = -(-columns // per_thread)
    blocks = -(-needed // THREADS)
    return Chunks(blocks, -(-needed // (blocks * 32)) * 32)


def launch_chunks(m, name: str, shape: tuple[int, int], vector: int, per_thread: int, arrays: tuple, *more,
                  file: str = "") -> None:
    """Launches name_<vector> of `file` (name.cu) on an output of `shape` where its width is a multiple of `vector`, else name_1;
    nothing where the output is empty. Arguments: arrays, rows, width, blocks per row, more."""
    most, width = shape
    if most == 0 or width == 0:
        return
    fast = width % vector == 0
    chunks = chunks_of(width, per_thread if fast else 1)
    m.launch(file or f"{name}.cu", f"{name}_{vector if fast else 1}", (most * chunks.per_row,), (chunks.threads,),
             (*arrays, np.int32(most), np.int32(width), np.int32(chunks.per_row), *more))
