"""act(gate) * up of an expert's first product (SwiGLU and its kin: Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import numpy as np

from hpcmoe.kernels.chunks import launch_chunks
from hpcmoe.kernels.loader import valid
from hpcmoe.model.dtypes import from_fp32, name_of, to_fp32
from hpcmoe.products.arrays import activate

ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}  # as in swiglu.cu


def swiglu(m, both_if, out_if, *, act: str, rows=None) -> None:
    """out_if T [I, f] = act(gate) * up of both_if T [I, 2 f], gate in its first half; act: a key of ACTS.

    Computed in fp32, rounded once. rows int32 [1]: only so many rows.
    """
    launch_chunks(m, "swiglu", out_if.shape, 8, 16, (both_if, out_if, rows), np.int32(ACTS[act]))


def swiglu_twin(both_if, out_if, *, act: str, rows=None) -> None:
    """swiglu on host arrays."""
    n, width = valid(rows, len(out_if)), out_if.shape[1]
    both = to_fp32(both_if[:n])
    out_if[:n] = from_fp32(activate(act, both[:, :width]) * both[:, width:], name_of(out_if.dtype))
