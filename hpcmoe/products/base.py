"""What all products with a fixed weight share: their interface, and the checks of what goes in and out.

Letters: t rows, n outputs, k inputs; in a gated unit d inputs and f hidden outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from hpcmoe.errors import UserError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class Linear(ABC):
    """y [t, n] = x [t, k] W^T + b. `nbytes`: of the weight as it is owned."""

    n: int
    k: int
    nbytes: int

    @abstractmethod
    def __call__(self, x_tk, out=None):
        """fp32 rows for fp32 rows, any number of them; rows of uint16 are read as bf16.

        out: where to put y, contiguous fp32 [t, n]; ValueError for any other.
        """

    @abstractmethod
    def weights(self) -> list[np.ndarray]:
        """The weight as it is owned, as bytes: written over, they make another weight of the same shape. On a CPU."""

    @abstractmethod
    def clone(self) -> "Linear":
        """The same product with a copy of the weight in memory of its own. On a CPU."""


class Backend(ABC):
    """What makes products: name, version of its library, dtype of its inputs, threads it uses."""

    name: str
    version: str
    dtype: str
    threads: int

    @abstractmethod
    def linear(self, weight_nk, bias_n=None) -> Linear:
        """Owns a weight as checkpoints store it: fp32, fp16, or bf16 bits in uint16; the source may go afterwards."""

    @abstractmethod
    def glu(self, gate_fd, up_fd, act: str = "silu") -> Linear:
        """The gated unit h [t, f] = act(x W_gate^T) * (x W_up^T); act: silu, gelu, gelu_tanh or relu."""

    def expert(self, gate_fd, up_fd, down_df, act: str = "silu") -> Linear:
        """A whole gated expert, y [t, d] = h W_down^T of the unit above."""
        return Chain(self.glu(gate_fd, up_fd, act), self.linear(down_df))


class Chain(Linear):
    """One product after the other."""

    def __init__(self, first: Linear, second: Linear):
        self.first, self.second = first, second
        self.n, self.k, self.nbytes = second.n, first.k, first.nbytes + second.nbytes

    def __call__(self, x_tk, out=None):
        return self.second(self.first(x_tk), out=out)

    def weights(self) -> list[np.ndarray]:
        return self.first.weights() + self.second.weights()

    def clone(self) -> "Chain":
        return Chain(self.first.clone(), self.second.clone())


def check_activation(act: str) -> None:
    if act not in ACTIVATIONS:
        raise UserError(f"activation = {act!r}: expected one of {', '.join(ACTIVATIONS)}")


def rows_of(x_tk, k: int, dtype: str = "fp32"):
    """x as contiguous rows that a product takes: fp32, or bf16 bits where the product computes in bf16."""
    if x_tk.ndim != 2 or x_tk.shape[1] != k:
        raise ValueError(f"rows of shape {x_tk.shape}: expected [t, {k}]")
    if x_tk.dtype == np.uint16 and dtype == "fp32":
        x_tk = (x_tk.astype(np.uint32) << 16).view(np.float32)
    if not isinstance(x_tk, np.ndarray):
        return x_tk
    return np.ascontiguousarray(x_tk, dtype=None if x_tk.dtype == np.uint16 else np.float32)


def output(xp, out, rows: int, n: int):
    if out is None:
        return xp.empty((rows, n), np.float32)
    if out.shape != (rows, n) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} of shape {out.shape}: expected contiguous float32 [{rows}, {n}]")
    return out
