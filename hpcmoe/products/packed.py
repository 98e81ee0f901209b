"""Products by oneDNN, with weights in its own layout, in fp32 or bf16."""

from __future__ import annotations

import copy

import numpy as np

from hpcmoe import onednn
from hpcmoe.products.base import Backend, Linear, check_activation, output, rows_of
from hpcmoe.products.fused import PackedExpert
from hpcmoe.products.primitives import layout, rounding
from hpcmoe.products.weights import PackedBias, PackedWeight, zeroed
from hpcmoe.products.widen import bias_fp32


class OneDnnBackend(Backend):
    name = "onednn"

    def __init__(self, dtype: str):
        self.library, self.dtype = onednn.load(), dtype
        self.version = self.library.version
        self._scratch: dict[str, np.ndarray] = {}

    @property
    def threads(self) -> int:
        return self.library.threads

    def linear(self, weight_nk, bias_n=None) -> Linear:
        return PackedLinear(self, weight_nk, bias_n)

    def glu(self, gate_fd, up_fd, act: str = "silu") -> Linear:
        check_activation(act)
        return PackedGlu(self, gate_fd, up_fd, act)

    def expert(self, gate_fd, up_fd, down_df, act: str = "silu") -> Linear:
        check_activation(act)
        if self.dtype == "fp32" and layout(self.library, *down_df.shape, self.dtype).avx2:
            return PackedExpert(self, gate_fd, up_fd, down_df, act)
        return super().expert(gate_fd, up_fd, down_df, act)

    def scratch(self, name: str, nbytes: int) -> int:
        """Address of working memory that lives until the next call of this name; grows, and is never given back."""
        if name not in self._scratch or self._scratch[name].nbytes < nbytes:
            self._scratch[name] = zeroed(nbytes)
        return self._scratch[name].ctypes.data

    def inputs(self, weight: PackedWeight, x_tk: np.ndarray) -> list[int]:
        """Addresses of x for each part of the weight, rounded to bf16 or cut where need be."""
        rows, k = x_tk.shape
        if self.dtype == "bf16" and x_tk.dtype == np.float32:
            rounded = self.scratch("x", rows * k * 2)
            rounding(self.library, rows, k).run(x_tk.ctypes.data, rounded)
            return [rounded]
        if len(weight.parts) == 1:
            return [x_tk.ctypes.data]
        self.scratch("x", rows * k * 4)
        flat = self._scratch["x"].view(np.float32)
        ends = [part.k0 for part in weight.parts[1:]] + [k]
        for part, end in zip(weight.parts, ends):
            cut = flat[rows * part.k0:rows * end].reshape(rows, end - part.k0)
            np.copyto(cut, x_tk[:, part.k0:end])
        return [flat.ctypes.data + 4 * rows * part.k0 for part in weight.parts]


class PackedLinear(Linear):
    def __init__(self, backend: OneDnnBackend, weight_nk, bias_n=None):
        self.backend = backend
        self.weight = PackedWeight(backend.library, weight_nk, backend.dtype)
        self.n, self.k, self.nbytes = self.weight.n, self.weight.k, self.weight.nbytes
        self._bias = PackedBias(backend.library, self.weight, bias_fp32(bias_n)) if bias_n is not None else None
        self._products = self.weight.products(bias_n is not None, ())

    def __call__(self, x_tk, out=None):
        x_tk = rows_of(x_tk, self.k, self.backend.dtype)
        out = output(np, out, len(x_tk), self.n)
        y, step, bias = out.ctypes.data, out.strides[0], self._bias.memory if self._bias else 0
        with self.backend.library.lock:
            for t0 in range(0, len(x_tk), self.weight.slab):
                x_slab = x_tk[t0:t0 + self.weight.slab]
                xs = self.backend.inputs(self.weight, x_slab)
                for part, product, x in zip(self.weight.parts, self._products, xs):
                    product.run(len(x_slab), x, part.memory, y + t0 * step, bias)
        return out

    def weights(self) -> list[np.ndarray]:
        return self.weight.buffers()

    def clone(self) -> "PackedLinear":
        twin = copy.copy(self)
        twin.weight = self.weight.clone()
        return twin


class PackedGlu(Linear):
    """act and the product of the two halves are fused into the matrix products; slabs keep the gate in the caches."""

    def __init__(self, backend: OneDnnBackend, gate_fd, up_fd, act: str):
        if gate_fd.shape != up_fd.shape:
            raise ValueError(f"gate {gate_fd.shape} and up {up_fd.shape} differ")
        self.backend = backend
        self.gate = PackedWeight(backend.library, gate_fd, backend.dtype)
        self.up = PackedWeight(backend.library, up_fd, backend.dtype)
        self.n, self.k, self.nbytes = self.up.n, self.up.k, self.gate.nbytes + self.up.nbytes
        self._gate_products = self.gate.products(False, (act,))
        self._up_products = self.up.products(False, ("mul",))

    def __call__(self, x_td, out=None):
        x_td = rows_of(x_td, self.k, self.backend.dtype)
        out = output(np, out, len(x_td), self.n)
        h, step = out.ctypes.data, out.strides[0]
        with self.backend.library.lock:
            for t0 in range(0, len(x_td), self.up.slab):
                x_slab = x_td[t0:t0 + self.up.slab]
                rows, xs = len(x_slab), self.backend.inputs(self.up, x_slab)
                gate = self.backend.scratch("gate", rows * self.n * 4)
                for part, product, x in zip(self.gate.parts, self._gate_products, xs):
                    product.run(rows, x, part.memory, gate)
                for part, product, x in zip(self.up.parts, self._up_products, xs):
                    product.run(rows, x, part.memory, h + t0 * step, other=gate)
        return out

    def weights(self) -> list[np.ndarray]:
        return self.gate.buffers() + self.up.buffers()

    def clone(self) -> "PackedGlu":
        twin = copy.copy(self)
        twin.gate, twin.up = self.gate.clone(), self.up.clone()
        return twin
