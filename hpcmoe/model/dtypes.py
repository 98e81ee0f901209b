"""Storage types of weights: fp32, fp16, and bf16 held as its 16 bits in uint16.

NumPy has no bf16. A bf16 is the upper half of an fp32, so widening is a shift.
"""

from __future__ import annotations

import numpy as np

from hpcmoe.device import xp_of

STORED = {"fp16": np.dtype("<f2"), "bf16": np.dtype("<u2"), "fp32": np.dtype("<f4")}


def name_of(dtype) -> str:
    """"fp16", "bf16" or "fp32" for a stored array's dtype. ValueError for any other."""
    for name, stored in STORED.items():
        if stored == dtype:
            return name
    raise ValueError(f"no weights are stored as {dtype}")


def to_fp32(array):
    """fp32 values of a stored array (float16, uint16 holding bf16 bits, or float32: itself)."""
    if array.dtype == np.float32:
        return array
    if array.dtype == np.uint16:
        wide = array.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    raise ValueError(f"no weights are stored as {array.dtype}")


def from_fp32(array, dtype: str):
    """A stored array ("fp16", "bf16", "fp32") of fp32 values, rounded to nearest, ties to even.

    Values beyond fp16's 65504 become infinite; a NaN stays a NaN.
    """
    if dtype == "fp32":
        return array
    xp = xp_of(array)
    if dtype == "fp16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16)
    if dtype != "bf16":
        raise ValueError(f"no weights are stored as {dtype}")
    bits = xp.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16))
    # The addition would carry a NaN with low payload bits over into an infinity.
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return xp.where(nan, quiet, rounded).astype(np.uint16)
