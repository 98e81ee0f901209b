"""Weights in oneDNN's own layout (the figures behind the choices: onednn.py).

Letters: k columns of x (the inner length), n columns of y; a weight is [n, k], as checkpoints have it.
"""

from __future__ import annotations

import contextlib
import copy
import mmap
import weakref

import numpy as np

from hpcmoe.onednn import BYTES, Dims, Handles, Library
from hpcmoe.products.primitives import Layout, Product, Reorder, layout, product
from hpcmoe.products.widen import widen

SLAB_AVX2 = 80    # rows of one call at most: the best number of rows, beyond which a slower regime begins
SLAB = 512
PART_AVX2 = 2048  # columns: 64 rows of them fit in an L2 cache of 512 KiB
HUGE = 1 << 21    # bytes of a huge page
ROOM = 32 * HUGE  # bytes mapped at once for weights
TILE = 1 << 19    # bytes widened at once on the way into the layout: about an L2 cache


def zeroed(nbytes: int) -> np.ndarray:
    """Page-aligned zero bytes, in huge pages where the system has them: 4 KiB pages cost more than the packing."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them: small pages do
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:nbytes]


class Room:
    """Zero bytes for what stays as long as the run, out of mappings of whole huge pages.

    A mapping per weight would end in small pages, up to 2 MiB each, and a process has 65,530 mappings at
    most. Memory of a mapping is given back when the last array in it has gone.
    """

    def __init__(self):
        self.left = np.zeros(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """The next page-aligned nbytes."""
        size = nbytes + -nbytes % mmap.PAGESIZE
        if size > len(self.left):
            mapped = zeroed(max(size, ROOM) + HUGE)
            self.left = mapped[-mapped.ctypes.data % HUGE:]
        taken, self.left = self.left[:nbytes], self.left[size:]
        return taken


_room = Room()  # of this process; used with a library's lock held


class Part:
    """Columns k0:k0+k of a weight in their layout: the buffer and oneDNN's memory object for it."""

    def __init__(self, library: Library, place: Layout, k0: int, weight_nk: np.ndarray):
        self.layout, self.k0 = place, k0
        self.nbytes = library.size(place.desc)
        self._take(library)
        self._fill(library, weight_nk[:, k0:k0 + place.k])

    def _take(self, library: Library) -> None:
        self.buffer = _room.take(self.nbytes)
        self.memory = library.memory(self.layout.desc, self.buffer.ctypes.data)
        weakref.finalize(self, library.lib.dnnl_memory_destroy, self.memory).atexit = False

    def clone(self, library: Library) -> "Part":
        twin = copy.copy(self)
        twin._take(library)
        twin.buffer[:] = self.buffer
        return twin

    def _fill(self, library: Library, source_nk: np.ndarray) -> None:
        """Reorders the source: at one go where oneDNN reads it well, else by tiles of fp32 rows."""
        n, k = source_nk.shape
        block, stride = library.blocks(self.layout.desc, self.layout.turned((0, 1))[0])
        read = (np.float32, np.uint16) if self.layout.dtype == "bf16" else (np.float32,)
        direct = source_nk.dtype in read and source_nk.strides[0] > 0 and source_nk.strides[1] == source_nk.itemsize
        whole = n // block * block
        step = n if direct else max(TILE // (4 * k * block), 1) * block
        tile = None if direct else np.empty((min(step, n), k), np.float32)
        ranges = [(n0, min(n0 + step, whole)) for n0 in range(0, whole, step)] + [(whole, n)] * (whole < n)
        move = None
        for n0, n1 in ranges:
            rows_nk = source_nk[n0:n1]
            if not direct:
                widen(tile[:n1 - n0], rows_nk)
                rows_nk = tile[:n1 - n0]
            if move is None or n1 - n0 != ranges[0][1]:
                move = self._move(library, rows_nk, n0 if n0 == whole else 0)
            offset = 0 if n0 == whole else n0 // block * stride * BYTES[self.layout.dtype]
            move.run(rows_nk.ctypes.data, self.buffer.ctypes.data + offset)

    def _move(self, library: Library, rows_nk: np.ndarray, offset: int) -> Reorder:
        """A copy of some rows into the layout, from row `offset` on: 0 and an address for whole blocks, else the offset."""
        place = self.layout
        dims, item = place.turned(rows_nk.shape), rows_nk.itemsize
        with Handles(library) as handles:
            source = handles.desc(dims, "bf16" if item == 2 else "fp32", place.turned(tuple(s // item for s in rows_nk.strides)))
            target = handles.keep("memory_desc", library.make(
                "memory_desc_create_submemory", place.desc, Dims(*dims), Dims(*place.turned((offset, 0)))))
            return Reorder(library, source, target)


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

    def buffers(self) -> list[np.ndarray]:
        return [part.buffer for part in self.parts]

    def clone(self) -> "PackedWeight":
        twin = copy.copy(self)
        with self.library.lock:
            twin.parts = [part.clone(self.library) for part in self.parts]
        return twin

    def products(self, bias: bool, post: tuple[str, ...], y_dtype: str = "fp32") -> list[Product]:
        """The product of each part: the first adds the bias, the later ones add to y, the last does post."""
        last = len(self.parts) - 1
        return [product(self.library, part.layout, bias and i == 0,
                        (("sum",) if i else ()) + (post if i == last else ()), (self.dtype, y_dtype))
                for i, part in enumerate(self.parts)]


class PackedBias:
    """An fp32 bias [n] as the products of a weight take it."""

    def __init__(self, library: Library, weight: PackedWeight, bias_n: np.ndarray):
        self.values = np.ascontiguousarray(bias_n, dtype=np.float32)
        inner = weight.parts[0].layout.kind == "inner_product"
        with Handles(library) as handles:
            desc = handles.desc((weight.n,) if inner else (1, weight.n), "fp32")
            self.memory = library.memory(desc, self.values.ctypes.data)
        weakref.finalize(self, library.lib.dnnl_memory_destroy, self.memory).atexit = False
