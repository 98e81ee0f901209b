"""oneDNN's C library through ctypes: packed weights, and products with them that are planned once and run often.

Constants and signatures are those of the C API version 3 (oneDNN developer guide, "C API";
`dnnl_types.h`), which keeps them for all 3.x libraries.

What was measured here and shapes this file (oneDNN 3.2, one thread):
- On CPUs with AVX2 alone, a matmul primitive does not use packed weights; an inner product does.
  With AVX-512 and more both do.
- The AVX2 inner product has two regimes, with a border between 80 and 84 rows, and the one for few
  rows is the faster one also when many rows are cut into slabs. Within it a row's result mostly does
  not depend, to the bit, on how many rows come with it (it does for some widths, such as 1000).
- Beyond about 2048 columns its rows fall out of the L2 cache (14,336 columns: 24 instead of 78
  GFLOP/s at 64 rows), hence the cut of k into parts that are summed.
- A primitive belongs to one number of rows, and costs 0.3 ms to make, against 1 ms to 15 ms for a run
  of one expert's product; slabs keep their number small, so each is made once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import threading
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p

ENV = "HPCMOE_ONEDNN"
WHEEL = "onednn-cpu-gomp"
SONAME = "libdnnl.so.3"

STATUS = ("success", "out of memory", "invalid arguments", "unimplemented", "last implementation reached",
          "runtime error", "not required", "invalid graph", "invalid graph op", "invalid shape", "invalid data type")
CPU, IN_ORDER, FORWARD_INFERENCE, TAG_ANY = 1, 1, 96, 1
DTYPES = {"fp16": 1, "bf16": 2, "fp32": 3}
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
ELTWISE = {"relu": 0x20, "gelu_tanh": 0x2B, "silu": 0x2C, "gelu": 0x31}
BINARY_MUL = 0x1FFF1
SRC, SRC_1, DST, WEIGHTS, BIAS = 1, 2, 17, 33, 41
POST_OP = 32768  # (i + 1) * POST_OP | SRC_1: the second operand of post-op i
QUERY_IMPL, QUERY_STRIDES, QUERY_WEIGHTS_MD, QUERY_INNER_N, QUERY_INNER_BLOCKS, QUERY_INNER_DIMS = 8, 14, 131, 263, 264, 265

Dims = c_int64 * 12


class Unavailable(Exception):
    """oneDNN, or a data type of it, cannot be had on this machine; the text is the reason."""


class Failure(RuntimeError):
    """A call of the library failed: a fault of this program or of the library."""


class Arg(ctypes.Structure):
    _fields_ = [("index", c_int), ("memory", c_void_p)]


class Version(ctypes.Structure):
    _fields_ = [("major", c_int), ("minor", c_int), ("patch", c_int)]


SIGNATURES = {
    "engine_create": (POINTER(c_void_p), c_int, c_size_t),
    "stream_create": (POINTER(c_void_p), c_void_p, c_int),
    "memory_desc_create_with_strides": (POINTER(c_void_p), c_int, Dims, c_int, Dims),
    "memory_desc_create_with_tag": (POINTER(c_void_p), c_int, Dims, c_int, c_int),
    "memory_desc_create_submemory": (POINTER(c_void_p), c_void_p, Dims, Dims),
    "memory_desc_clone": (POINTER(c_void_p), c_void_p),
    "memory_desc_query": (c_void_p, c_int, c_void_p),
    "memory_desc_destroy": (c_void_p,),
    "memory_create": (POINTER(c_void_p), c_void_p, c_void_p, c_void_p),
    "memory_set_data_handle": (c_void_p, c_void_p),
    "memory_destroy": (c_void_p,),
    "post_ops_create": (POINTER(c_void_p),),
    "post_ops_append_sum": (c_void_p, c_float, c_int32, c_int),
    "post_ops_append_eltwise": (c_void_p, c_int, c_float, c_float),
    "post_ops_append_binary": (c_void_p, c_int, c_void_p),
    "post_ops_destroy": (c_void_p,),
    "primitive_attr_create": (POINTER(c_void_p),),
    "primitive_attr_set_post_ops": (c_void_p, c_void_p),
    "primitive_attr_destroy": (c_void_p,),
    "matmul_primitive_desc_create": (POINTER(c_void_p),) + (c_void_p,) * 6,
    "inner_product_forward_primitive_desc_create": (POINTER(c_void_p), c_void_p, c_int) + (c_void_p,) * 5,
    "reorder_primitive_desc_create": (POINTER(c_void_p),) + (c_void_p,) * 5,
    "primitive_desc_query": (c_void_p, c_int, c_int, c_void_p),
    "primitive_desc_destroy": (c_void_p,),
    "primitive_create": (POINTER(c_void_p), c_void_p),
    "primitive_destroy": (c_void_p,),
    "primitive_execute": (c_void_p, c_void_p, c_int, POINTER(Arg)),
}


def paths() -> list[str]:
    """Where the library may be, best first: $HPCMOE_ONEDNN alone if set, the wheel's file, the loader's own search."""
    if os.environ.get(ENV):
        return [os.environ[ENV]]
    found = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(WHEEL) or ():
            if file.name == SONAME:
                found.append(os.path.realpath(file.locate()))
    return [*found, SONAME]


def load() -> Library:
    """The library of this process, loaded on first use. Raises Unavailable with the reason."""
    if os.environ.get(ENV, "").lower() in ("off", "0", "none"):
        raise Unavailable(f"switched off by {ENV}={os.environ[ENV]}")
    reasons = []
    for path in paths():
        try:
            return _open(path)
        except (OSError, Unavailable) as error:
            reasons.append(str(error))
    hint = f"install the {WHEEL} wheel or set {ENV} to a {SONAME}"
    raise Unavailable("; ".join(dict.fromkeys(reasons)) + f" ({hint})")


@functools.cache
def _open(path: str) -> Library:
    return Library(ctypes.CDLL(path), path)


class Library:
    """A loaded libdnnl with its CPU engine and stream, and the calls this program needs.

    version: "3.2.0"; lock: held while a product runs, since argument lists and the stream are shared.
    """

    def __init__(self, lib: ctypes.CDLL, path: str):
        self.lib, self.path, self.lock = lib, path, threading.RLock()
        if not hasattr(lib, "dnnl_version"):
            raise Unavailable(f"{path} is no oneDNN library")
        lib.dnnl_version.restype = POINTER(Version)
        version = lib.dnnl_version().contents
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        if version.major != 3:
            raise Unavailable(f"{path} is oneDNN {self.version}: expected 3.x")
        for name, argtypes in SIGNATURES.items():
            getattr(lib, "dnnl_" + name).argtypes = argtypes
        lib.dnnl_memory_desc_get_size.restype, lib.dnnl_memory_desc_get_size.argtypes = c_size_t, (c_void_p,)
        lib.dnnl_primitive_desc_query_md.restype = c_void_p
        lib.dnnl_primitive_desc_query_md.argtypes = (c_void_p, c_int, c_int)
        lib.dnnl_cpu_isa2str.restype = c_char_p
        self.isa = lib.dnnl_cpu_isa2str(lib.dnnl_get_effective_cpu_isa()).decode().removeprefix("cpu_isa_")
        self.execute_now = lib.dnnl_primitive_execute
        self.set_handle = lib.dnnl_memory_set_data_handle
        self.engine = self.make("engine_create", CPU, 0)
        self.stream = self.make("stream_create", self.engine, IN_ORDER)

    @property
    def threads(self) -> int:
        """OpenMP threads a product uses."""
        try:
            return self.lib.omp_get_max_threads()  # found in the library's own OpenMP runtime
        except AttributeError:
            return len(os.sched_getaffinity(0))

    def call(self, name: str, *args) -> None:
        status = getattr(self.lib, "dnnl_" + name)(*args)
        if status:
            what = STATUS[status] if status < len(STATUS) else str(status)
            raise Failure(f"oneDNN {self.version}: dnnl_{name}: {what}")

    def make(self, name: str, *args) -> int:
        """The handle that dnnl_NAME(&handle, ...) makes."""
        handle = c_void_p()
        self.call(name, byref(handle), *args)
        return handle.value

    def desc(self, dims, dtype: str, strides=None) -> int:
        """A memory descriptor; strides in elements (row-major if None), or "any" for the library's choice."""
        if strides == "any":
            return self.make("memory_desc_create_with_tag", len(dims), Dims(*dims), DTYPES[dtype], TAG_ANY)
        if strides is None:
            strides = (dims[1], 1) if len(dims) == 2 else (1,)
        return self.make("memory_desc_create_with_strides", len(dims), Dims(*dims), DTYPES[dtype], Dims(*strides))

    def memory(self, desc: int, address: int = 0) -> int:
        return self.make("memory_create", desc, self.engine, address)

    def size(self, desc: int) -> int:
        return self.lib.dnnl_memory_desc_get_size(desc)

    def impl(self, primitive_desc: int) -> str:
        """Name of the implementation chosen, e.g. "brgemm:avx2"."""
        name = c_char_p()
        self.call("primitive_desc_query", primitive_desc, QUERY_IMPL, 0, byref(name))
        return name.value.decode()

    def run(self, primitive: int, args) -> None:
        status = self.execute_now(primitive, self.stream, len(args), args)
        if status:
            raise Failure(f"oneDNN {self.version}: dnnl_primitive_execute: {STATUS[status]}")

    def blocks(self, desc: int, dim: int) -> tuple[int, int]:
        """(block, stride) of a dimension of a blocked layout: stride is that of whole blocks, in elements."""
        strides, sizes, dims, count = POINTER(c_int64)(), POINTER(c_int64)(), POINTER(c_int64)(), c_int()
        for query, result in ((QUERY_STRIDES, strides), (QUERY_INNER_N, count),
                              (QUERY_INNER_BLOCKS, sizes), (QUERY_INNER_DIMS, dims)):
            self.call("memory_desc_query", desc, query, byref(result))
        block = 1
        for i in range(count.value):
            if dims[i] == dim:
                block *= sizes[i]
        return block, strides[dim]


class Handles(contextlib.ExitStack):
    """Handles that only serve while something is planned, destroyed at the end of a `with` block."""

    def __init__(self, library: Library):
        super().__init__()
        self.library = library

    def keep(self, kind: str, handle: int) -> int:
        self.callback(getattr(self.library.lib, f"dnnl_{kind}_destroy"), handle)
        return handle

    def desc(self, dims, dtype: str, strides=None) -> int:
        return self.keep("memory_desc", self.library.desc(dims, dtype, strides))
