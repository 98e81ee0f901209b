"""Arrays in device memory, with the part of cupy.ndarray that needs no kernels of CuPy's own.

Nothing is converted behind the caller's back: no NumPy array mixes with these, no value is read
but by get(), no arithmetic exists.
"""

from __future__ import annotations

import ctypes

import numpy as np

from . import _memory, _stream

NO_CONVERSION = "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly."


def _refuse(what: str):
    def method(self, *args, **kwargs):
        raise TypeError(f"the CuPy look-alike refuses {what} of a device array")
    return method


class ndarray:
    """A device array. `_host` is the same array in the shadow, which only work on a stream may read or write."""

    __array_ufunc__ = None  # NumPy's operators give up
    __hash__ = None

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        shape = (shape,) if np.isscalar(shape) else tuple(int(n) for n in shape)
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if strides is not None:
            nbytes = sum((n - 1) * s for n, s in zip(shape, strides)) + dtype.itemsize if nbytes else 0
        self.data = memptr if memptr is not None else _memory.pool.malloc(nbytes)
        self._host = np.ndarray(shape, dtype, _bytes_at(self.data.ptr, nbytes), strides=strides)

    @classmethod
    def _of(cls, host: np.ndarray, parent: "ndarray") -> "ndarray":
        """The part of `parent` that `host` shows of its shadow."""
        self = cls.__new__(cls)
        self._host = host
        offset = host.__array_interface__["data"][0] - parent._host.__array_interface__["data"][0] if host.size else 0
        self.data = _memory.MemoryPointer(None, 0)
        if host.size:
            self.data.mem, self.data.ptr = parent.data.mem, parent.data.ptr + offset
        return self

    dtype = property(lambda self: self._host.dtype)
    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    ndim = property(lambda self: self._host.ndim)
    itemsize = property(lambda self: self._host.itemsize)
    flags = property(lambda self: self._host.flags)

    @property
    def __cuda_array_interface__(self) -> dict:
        return {"shape": self.shape, "typestr": self.dtype.str, "descr": self.dtype.descr, "version": 3,
                "strides": None if self.flags.c_contiguous else self.strides, "data": (self.data.ptr, False),
                "stream": _stream.get_current_stream().ptr or 1}

    # ------------------------------------------------------------ views
    def __getitem__(self, index) -> "ndarray":
        index = index if isinstance(index, tuple) else (index,)
        for part in index:
            if not (part is None or part is Ellipsis or isinstance(part, (int, np.integer, slice))) or isinstance(part, bool):
                raise NotImplementedError(f"the CuPy look-alike has basic indexing only, not {type(part).__name__}")
        # An Ellipsis makes NumPy give a view even of a single element.
        return self._of(self._host[index if Ellipsis in index else (*index, Ellipsis)], self)

    def reshape(self, *shape) -> "ndarray":
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], (int, np.integer)) else shape
        if not self.flags.c_contiguous:
            raise NotImplementedError("the CuPy look-alike reshapes contiguous arrays only")
        return self._of(self._host.reshape(shape), self)

    def ravel(self) -> "ndarray":
        return self.reshape(-1)

    def view(self, dtype=None) -> "ndarray":
        return self._of(self._host.view(dtype or self.dtype), self)

    # ------------------------------------------------------------ copies
    def get(self, stream=None, order="C", out: np.ndarray | None = None, blocking: bool = True) -> np.ndarray:
        """A NumPy array with the values, after all work on the (current) stream. Not blocking: `out` is pinned and filled later."""
        stream = stream or _stream.get_current_stream()
        out = np.empty(self.shape, self.dtype) if out is None else out
        if out.shape != self.shape or out.dtype != self.dtype:
            raise ValueError(f"out is {out.dtype}{out.shape}, the array {self.dtype}{self.shape}")
        source = self._host
        if not blocking:
            _memory.check_operand(out.ctypes.data, out.nbytes, "host")
        _stream.put(stream, lambda: np.copyto(out, source), "memcpyAsync")
        if blocking:
            stream.synchronize()
        return out

    def set(self, values: np.ndarray, stream=None) -> None:
        """Copies a NumPy array here, on the (current) stream. Pinned memory is read when the copy runs, other memory now."""
        if not isinstance(values, np.ndarray) or values.shape != self.shape or values.dtype != self.dtype:
            raise ValueError(f"set wants a NumPy array {self.dtype}{self.shape}")
        if self.size:
            values = values if _memory.is_pinned(values.ctypes.data, values.nbytes) else values.copy()
            target = self._host
            _stream.put(stream or _stream.get_current_stream(), lambda: np.copyto(target, values), "memcpyAsync")

    def fill(self, value) -> None:
        """On the current stream."""
        target, value = self._host, self.dtype.type(value)
        if self.size:
            _stream.put(_stream.get_current_stream(), lambda: target.fill(value), "fill")

    def copy(self) -> "ndarray":
        fresh = ndarray(self.shape, self.dtype)
        fresh[...] = self
        return fresh

    def __setitem__(self, index, value) -> None:
        """A device array of the same type, or a number; on the current stream."""
        target = self[index]
        if isinstance(value, ndarray):
            if value.dtype != self.dtype:
                raise NotImplementedError(f"the CuPy look-alike assigns equal types only, not {value.dtype} to {self.dtype}")
            to, source = target._host, value._host
            np.broadcast_shapes(to.shape, source.shape)
            if target.size and np.may_share_memory(to, source):
                raise ValueError("a copy between overlapping parts of an array")
            if target.size:
                _stream.put(_stream.get_current_stream(), lambda: np.copyto(to, source), "copy")
        elif isinstance(value, np.ndarray):
            raise TypeError("a NumPy array cannot be assigned to a device array")
        else:
            target.fill(value)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<device array {self.dtype}{self.shape} at {self.data.ptr:#x}>"

    # ------------------------------------------------------------ refusals
    def __array__(self, *args, **kwargs):
        raise TypeError(NO_CONVERSION)

    def __array_function__(self, function, *args, **kwargs):
        raise TypeError(f"numpy.{function.__name__}: {NO_CONVERSION}")


for _name in ("iter", "contains", "float", "int", "index", "bool", "complex", "eq", "ne", "lt", "le", "gt", "ge", "neg", "abs",
              *(prefix + name for prefix in ("", "r", "i") for name in
                ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"))):
    setattr(ndarray, f"__{_name}__", _refuse(f"__{_name}__"))


def _bytes_at(pointer: int, nbytes: int):
    """The bytes where the CPU reaches them, as a buffer that owns nothing."""
    if not nbytes:
        return bytearray()
    if _memory.on_device(pointer):
        pointer = _memory.shadow(pointer, nbytes)
    elif not _memory.is_pinned(pointer, nbytes):
        raise ValueError(f"{pointer:#x} is neither device memory nor pinned host memory")
    return (ctypes.c_ubyte * nbytes).from_address(pointer)


# ---------------------------------------------------------------- creation
def empty(shape, dtype=float, order="C") -> ndarray:
    return ndarray(shape, dtype)


def full(shape, fill_value, dtype=None, order="C") -> ndarray:
    array = ndarray(shape, np.array(fill_value).dtype if dtype is None else dtype)
    array.fill(fill_value)
    return array


def zeros(shape, dtype=float, order="C") -> ndarray:
    return full(shape, 0, dtype)


def ones(shape, dtype=float, order="C") -> ndarray:
    return full(shape, 1, dtype)


def empty_like(a: ndarray, dtype=None) -> ndarray:
    return empty(a.shape, dtype or a.dtype)


def zeros_like(a: ndarray, dtype=None) -> ndarray:
    return zeros(a.shape, dtype or a.dtype)


def full_like(a: ndarray, fill_value, dtype=None) -> ndarray:
    return full(a.shape, fill_value, dtype or a.dtype)


def asarray(a, dtype=None, order=None, *, blocking: bool = False) -> ndarray:
    """A device array with the values of `a` (itself where it is one of that type); the copy is on the current stream."""
    if isinstance(a, ndarray):
        if dtype is not None and np.dtype(dtype) != a.dtype:
            raise NotImplementedError("the CuPy look-alike converts no types on the device")
        return a
    if hasattr(a, "__cuda_array_interface__"):
        raise NotImplementedError("the CuPy look-alike wraps no arrays of others")
    host = np.ascontiguousarray(np.asarray(a, dtype)).reshape(np.shape(a))
    array = ndarray(host.shape, host.dtype)
    array.set(host)
    if blocking:
        _stream.get_current_stream().synchronize()
    return array


def asnumpy(a, stream=None, order="C", out=None, *, blocking: bool = True) -> np.ndarray:
    return a.get(stream, order, out, blocking) if isinstance(a, ndarray) else np.asarray(a)


def copyto(dst: ndarray, src: ndarray) -> None:
    dst[...] = src
