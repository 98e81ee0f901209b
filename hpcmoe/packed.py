"""Weights in oneDNN's own layout (the figures behind the choices: onednn.py).

Letters: k columns of x (the inner length), n columns of y; a weight is [n, k], as checkpoints have it.
"""

from __future__ import annotations

import mmap
import weakref

import numpy as np

from hpcmoe.onednn import BYTES, Dims, Handles, Library
from hpcmoe.products import Layout, Product, layout, product, reorder

SLAB_AVX2 = 80    # rows of one call at most; beyond, the library changes to its slower regime
SLAB = 512
PART_AVX2 = 2048  # columns: 64 rows of them fit in an L2 cache of 512 KiB
TILE_ROWS = 96    # rows widened at once on the way into the layout; a multiple of all block sizes seen


def widen(tile_nk: np.ndarray, source_nk: np.ndarray) -> None:
    """Writes fp32 values of float16, or of uint16 that holds bf16 bits, or of any NumPy floats, to tile_nk.

    fp16 by integer operations, ten times as fast as NumPy's cast where that is not vectorised: with
    the fields moved to fp32's places, the value is 2^-112 of what it should be. That holds for fp16's
    subnormal numbers; infinities and NaNs are left to the cast.
    """
    if source_nk.dtype == np.uint16:
        np.left_shift(source_nk, 16, out=tile_nk.view(np.uint32), dtype=np.uint32)
    elif source_nk.dtype == np.float16 and ((source_nk.view(np.uint16) & 0x7FFF).max(initial=0) < 0x7C00):
        bits = tile_nk.view(np.int32)
        np.copyto(bits, source_nk.view(np.int16))
        np.left_shift(bits, 13, out=bits)
        np.bitwise_and(bits, np.int32(-0x70002000), out=bits)
        np.multiply(tile_nk, np.float32(2.0**112), out=tile_nk)
    else:
        np.copyto(tile_nk, source_nk, casting="same_kind")


def zeroed(nbytes: int) -> np.ndarray:
    """Page-aligned zero bytes, in huge pages where the system has them: 4 KiB pages cost more than the packing."""
    memory = mmap.mmap(-1, max(nbytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel built without them: small pages do
    return np.frombuffer(memory, np.uint8)[:nbytes]


class Part:
    """Columns k0:k0+k of a weight in their layout: the buffer and oneDNN's memory object for it."""

    def __init__(self, library: Library, place: Layout, k0: int, weight_nk: np.ndarray):
        self.layout, self.k0 = place, k0
        self.nbytes = library.size(place.desc)
        self.buffer = zeroed(self.nbytes)
        self.memory = library.memory(place.desc, self.buffer.ctypes.data)
        weakref.finalize(self, library.lib.dnnl_memory_destroy, self.memory).atexit = False
        self._fill(library, weight_nk[:, k0:k0 + place.k])

    def _fill(self, library: Library, source_nk: np.ndarray) -> None:
        """Reorders the source: at one go where oneDNN reads its dtype, else by tiles widened to fp32."""
        n, k = source_nk.shape
        block, _ = library.blocks(self.layout.desc, 0 if self.layout.kind == "inner_product" else 1)
        whole = n // block * block
        same = source_nk.dtype == np.float32 or (source_nk.dtype == np.uint16 and self.layout.dtype == "bf16")
        step = whole or n
        if not same:
            step = max(TILE_ROWS // block, 1) * block
            tile = np.empty((step, k), np.float32)
        for n0, n1 in [*((i, min(i + step, whole)) for i in range(0, whole, step)), (whole, n)]:
            if n0 == n1:
                continue
            rows_nk = source_nk[n0:n1]
            if not same:
                widen(tile[:n1 - n0], rows_nk)
                rows_nk = tile[:n1 - n0]
            self._place(library, rows_nk, n0, block)

    def _place(self, library: Library, rows_nk: np.ndarray, n0: int, block: int) -> None:
        """Reorders some rows to their place from n0 on, the start of a block."""
        place, (rows, k) = self.layout, rows_nk.shape
        item = rows_nk.itemsize
        strides = place.turned((rows_nk.strides[0] // item, rows_nk.strides[1] // item))
        address = self.buffer.ctypes.data
        last = n0 + rows == place.n and rows % block  # an incomplete block is named by its offset, others by address
        if not last:
            address += n0 // block * library.blocks(place.desc, 0 if place.kind == "inner_product" else 1)[1] * BYTES[place.dtype]
        with Handles(library) as handles:
            dims = place.turned((rows, k))
            source = handles.desc(dims, "bf16" if rows_nk.dtype == np.uint16 else "fp32", strides)
            target = handles.keep("memory_desc", library.make(
                "memory_desc_create_submemory", place.desc, Dims(*dims), Dims(*place.turned((n0 if last else 0, 0)))))
            reorder(library, handles, (source, rows_nk.ctypes.data), (target, address))


class PackedWeight:
    """A weight [n, k] that oneDNN owns, cut along k where the CPU's caches want it.

    weight_nk: float16, float32, or uint16 that holds bf16 bits, of any strides, e.g. a view of a file.
    """

    def __init__(self, library: Library, weight_nk: np.ndarray, dtype: str):
        self.library, self.dtype = library, dtype
        self.n, self.k = weight_nk.shape
        with library.lock:
            whole = layout(library, self.n, self.k, dtype)
            most = PART_AVX2 if whole.avx2 and dtype == "fp32" else self.k
            step = -(-self.k // -(-self.k // most))
            step += -step % 16 if step < self.k else 0
            self.parts = [Part(library, layout(library, self.n, min(step, self.k - k0), dtype), k0, weight_nk)
                          for k0 in range(0, self.k, step)]
        self.slab = SLAB_AVX2 if whole.avx2 else SLAB
        self.nbytes = sum(part.nbytes for part in self.parts)

    def products(self, bias: bool, post: tuple[str, ...], y_dtype: str = "fp32") -> list[Product]:
        """The product of each part: the first adds the bias, the later ones add to y, the last does post."""
        last = len(self.parts) - 1
        return [product(self.library, part.layout, bias and i == 0,
                        (("sum",) if i else ()) + (post if i == last else ()), (self.dtype, y_dtype))
                for i, part in enumerate(self.parts)]


def slabs(rows: int, most: int) -> list[tuple[int, int]]:
    """Nearly equal ranges of at most `most` rows; none for 0 rows.

    >>> slabs(81, 80)
    [(0, 41), (41, 81)]
    """
    count = -(-rows // most)
    return [(i * rows // count, (i + 1) * rows // count) for i in range(count)] if count else []


class PackedBias:
    """An fp32 bias [n] as the products of a weight take it."""

    def __init__(self, library: Library, weight: PackedWeight, bias_n: np.ndarray):
        self.values = np.ascontiguousarray(bias_n, dtype=np.float32)
        inner = weight.parts[0].layout.kind == "inner_product"
        with Handles(library) as handles:
            desc = handles.desc((weight.n,) if inner else (1, weight.n), "fp32")
            self.memory = library.memory(desc, self.values.ctypes.data)
        weakref.finalize(self, library.lib.dnnl_memory_destroy, self.memory).atexit = False
