"""A look-alike of CuPy without a GPU: the part that hpcmoe uses, on the driver stand-in, with lazy streams.

It is stricter than CuPy, so that what works on it has a chance on a GPU: see _stream.py and _array.py.
"""

import sys

import numpy
from numpy import (bool_, float16, float32, float64, int8, int16, int32, int64, intp, uint8, uint16, uint32, uint64,  # noqa: F401
                   uintp)

from . import cuda  # noqa: F401
from ._array import (asarray, asnumpy, copyto, empty, empty_like, full, full_like, ndarray, ones, zeros,  # noqa: F401
                     zeros_like)
from ._items import executed  # noqa: F401
from ._kernel import RawKernel, RawModule  # noqa: F401
from ._memory import pool as _pool
from ._stream import launches  # noqa: F401

__version__ = "14.2.0-lookalike"
array = asarray


def get_default_memory_pool():
    return _pool


def get_array_module(*args):
    return sys.modules[__name__] if any(isinstance(a, ndarray) for a in args) else numpy
