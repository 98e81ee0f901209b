"""oneDNN primitives that multiply rows with a weight in its layout (the figures behind the choices: onednn.py).

Letters: t rows, k columns of x (the inner length), n columns of y.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from dataclasses import dataclass

from hpcmoe import onednn
from hpcmoe.onednn import BIAS, BINARY_MUL, DST, ELTWISE, FORWARD_INFERENCE, POST_OP, SRC, SRC_1, WEIGHTS
from hpcmoe.onednn import Arg, Failure, Handles, Library, Unavailable

TYPICAL_ROWS = 64  # the layout is the one the library likes for so many rows
SHAPES_KEPT = 256  # primitives kept per product, one per number of rows
KINDS = ("inner_product", "matmul")


@dataclass(frozen=True)
class Layout:
    """Where a weight [n, k] of one dtype lies, and the kind of primitive that reads it there."""

    kind: str
    impl: str
    n: int
    k: int
    dtype: str
    desc: int

    @property
    def avx2(self) -> bool:
        return "avx2" in self.impl and "brg" in self.impl

    def turned(self, n_k: tuple) -> tuple:
        """A pair (of n, of k) in the order of this kind's weight dimensions."""
        return n_k if self.kind == "inner_product" else n_k[::-1]


def _describe(library: Library, handles: Handles, kind: str, rows: int, n: int, k: int, dtypes, weight: int,
              bias: bool = False, attr: int | None = None) -> int:
    """A primitive descriptor of kind for rows; dtypes (of x, of y); raises Failure where there is none."""
    x = handles.desc((rows, k), dtypes[0])
    y = handles.desc((rows, n), dtypes[1])
    b = handles.desc((n,) if kind == "inner_product" else (1, n), "fp32") if bias else None
    if kind == "inner_product":
        made = library.make("inner_product_forward_primitive_desc_create",
                            library.engine, FORWARD_INFERENCE, x, weight, b, y, attr)
    else:
        made = library.make("matmul_primitive_desc_create", library.engine, x, weight, b, y, attr)
    return handles.keep("primitive_desc", made)


@functools.lru_cache(maxsize=None)
def layout(library: Library, n: int, k: int, dtype: str) -> Layout:
    """The library's best layout for a weight [n, k]. Raises Unavailable where it has no fast product in dtype."""
    found, errors = [], []
    for kind in KINDS:
        with Handles(library) as handles:
            try:
                any_desc = handles.desc((n, k) if kind == "inner_product" else (k, n), dtype, "any")
                pd = _describe(library, handles, kind, TYPICAL_ROWS, n, k, (dtype, "fp32"), any_desc)
            except Failure as error:
                errors.append(str(error))
                continue
            desc = library.make("memory_desc_clone", library.lib.dnnl_primitive_desc_query_md(pd, onednn.QUERY_WEIGHTS_MD, 0))
            found.append(Layout(kind, library.impl(pd), n, k, dtype, desc))
    best = min(found, key=_rank, default=None)
    if best is None or best.impl.startswith("ref"):
        raise Unavailable(f"oneDNN {library.version} has no {dtype} product for this CPU ({library.isa}"
                          + (f"; {errors[0]}" if errors else "") + ")")
    return best


def _rank(candidate: Layout) -> int:
    """Packed products before others; inner products on AVX2, else matmul."""
    if candidate.impl.startswith("ref"):
        return 3
    if "brg" not in candidate.impl:
        return 2
    return 0 if candidate.avx2 == (candidate.kind == "inner_product") else 1


class Product:
    """post(x [t, k] W^T + b) for weights of one layout and any t; post: names in order of ELTWISE, "sum", "mul".

    "sum" adds what y held before; "mul" multiplies with another array [t, n].
    """

    def __init__(self, library: Library, place: Layout, bias: bool, post: tuple[str, ...], dtypes: tuple[str, str]):
        self.library, self.layout, self.bias, self.post, self.dtypes = library, place, bias, post, dtypes
        self.shapes: OrderedDict[int, tuple] = OrderedDict()

    def run(self, rows: int, x: int, weight: int, y: int, bias: int = 0, other: int = 0) -> None:
        """x, y, other: addresses; weight, bias: memory objects."""
        shape = self.shapes.get(rows)
        if shape is None:
            shape = self.shapes[rows] = self._plan(rows)
            if len(self.shapes) > SHAPES_KEPT:
                drop(self.library, self.shapes.popitem(last=False)[1])
        primitive, args, objects = shape
        place = self.library.set_handle
        place(objects[0], x)
        place(objects[1], y)
        args[2].memory = weight
        if self.bias:
            args[3].memory = bias
        if len(objects) == 3:
            place(objects[2], other)
        self.library.run(primitive, args)

    def _plan(self, rows: int) -> tuple:
        library, place = self.library, self.layout
        with Handles(library) as handles:
            attr = self._attributes(rows, handles)
            pd = _describe(library, handles, place.kind, rows, place.n, place.k, self.dtypes, place.desc, self.bias, attr)
            objects = [library.memory(handles.desc((rows, place.k), self.dtypes[0])),
                       library.memory(handles.desc((rows, place.n), self.dtypes[1]))]
            filled = [(SRC, objects[0]), (DST, objects[1]), (WEIGHTS, 0)] + ([(BIAS, 0)] if self.bias else [])
            if "mul" in self.post:
                objects.append(library.memory(handles.desc((rows, place.n), "fp32")))
                filled.append(((self.post.index("mul") + 1) * POST_OP | SRC_1, objects[2]))
            primitive = library.make("primitive_create", pd)
        return primitive, (Arg * len(filled))(*filled), objects

    def _attributes(self, rows: int, handles: Handles) -> int | None:
        if not self.post:
            return None
        library = self.library
        ops = handles.keep("post_ops", library.make("post_ops_create"))
        for name in self.post:
            if name == "sum":
                library.call("post_ops_append_sum", ops, 1.0, 0, 0)
            elif name == "mul":
                library.call("post_ops_append_binary", ops, BINARY_MUL, handles.desc((rows, self.layout.n), "fp32"))
            else:
                library.call("post_ops_append_eltwise", ops, ELTWISE[name], 1.0 if name == "silu" else 0.0, 0.0)
        attr = handles.keep("primitive_attr", library.make("primitive_attr_create"))
        library.call("primitive_attr_set_post_ops", attr, ops)
        return attr


@functools.lru_cache(maxsize=None)
def product(library: Library, place: Layout, bias: bool, post: tuple[str, ...], dtypes: tuple[str, str]) -> Product:
    """The one Product of its kind: all weights of a shape share its primitives."""
    return Product(library, place, bias, post, dtypes)


class Reorder:
    """A copy from one memory descriptor to another, changing layout and dtype, for any addresses."""

    def __init__(self, library: Library, source: int, target: int):
        self.library = library
        with Handles(library) as handles:
            pd = handles.keep("primitive_desc", library.make(
                "reorder_primitive_desc_create", source, library.engine, target, library.engine, None))
            self.impl = library.impl(pd)
            self.primitive = library.make("primitive_create", pd)
        self.objects = [library.memory(source), library.memory(target)]
        self.args = (Arg * 2)((SRC, self.objects[0]), (DST, self.objects[1]))
        weakref.finalize(self, drop, library, (self.primitive, None, self.objects)).atexit = False

    def run(self, source: int, target: int) -> None:
        self.library.set_handle(self.objects[0], source)
        self.library.set_handle(self.objects[1], target)
        self.library.run(self.primitive, self.args)


@functools.lru_cache(maxsize=4 * SHAPES_KEPT)
def rounding(library: Library, rows: int, k: int) -> Reorder:
    """From fp32 [rows, k] to bf16, rounded to nearest, ties to even."""
    with Handles(library) as handles:
        return Reorder(library, handles.desc((rows, k), "fp32"), handles.desc((rows, k), "bf16"))


def drop(library: Library, shape: tuple) -> None:
    """Destroys what a plan for one number of rows holds."""
    primitive, _, objects = shape
    library.call("primitive_destroy", primitive)
    for memory in objects:
        library.call("memory_destroy", memory)
