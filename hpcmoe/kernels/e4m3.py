"""fp8 in the format e4m3 on the host: one sign bit, four of exponent (bias 7), three of mantissa.

No infinity; NaN is S.1111.111; the largest value is 448 (OCP 8-bit Floating Point Specification, 1.0).
A row on the wire: its values divided by its scale, zeros up to a multiple of 16 bytes, then 16 bytes
that begin with the scale in fp32. Letters: i row, w bytes of a packed row, d width.
"""

from __future__ import annotations

import numpy as np

from hpcmoe.model.dtypes import to_fp32

MOST, NAN = 448.0, 0x7F


def fp8_width(d: int) -> int:
    """Bytes of a packed row of d values."""
    return (d + 15) // 16 * 16 + 16


def encode(x) -> np.ndarray:
    """uint8 codes of fp32 values, to the nearest, ties to even; beyond 448 (infinity too) becomes 448."""
    x = np.asarray(x, np.float32)
    nan = np.isnan(x)
    size = np.where(nan, np.float32(0), np.minimum(np.abs(x), np.float32(MOST)))
    # Values in [2^e, 2^(e+1)) become multiples of 2^(e-3), those below 2^-6 of 2^-9. frexp gives e + 1.
    exponent = np.frexp(np.maximum(size, np.float32(2.0 ** -6)))[1] - 1
    eighths = np.rint(np.ldexp(size, 3 - exponent))
    # 8 to 15 eighths are mantissas 0 to 7 of exponent field e + 7; 16 carries into the next one.
    code = (exponent + 6) * 8 + eighths.astype(np.int64)
    code |= np.where(np.signbit(x), 0x80, 0)
    return np.where(nan, NAN, code).astype(np.uint8)


def decode(code) -> np.ndarray:
    """fp32 values of uint8 codes; exact."""
    code = np.asarray(code, np.uint8)
    exponent, mantissa = (code >> 3 & 15).astype(np.int32), (code & 7).astype(np.float32)
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    size = np.where((code & 0x7F) == NAN, np.float32(np.nan), size)
    return np.where(code & 0x80, -size, size).astype(np.float32)


def fp8_pack(x_id, out_iw) -> None:
    """out_iw uint8 [i, fp8_width(d)]: rows x_id (T or fp32) [i, d] packed.

    A row's scale is its largest |x| / 448 (a NaN has no say), 1 where that is 0. A row with an infinity
    becomes NaN: its scale is infinite.
    """
    x_id, d = to_fp32(x_id), x_id.shape[1]
    most_i = np.fmax.reduce(np.abs(x_id), axis=1, initial=np.float32(0))
    with np.errstate(all="ignore"):
        scale_i = np.where(most_i > 0, most_i / np.float32(MOST), np.float32(1)).astype(np.float32)
        out_iw[:, :d] = encode(x_id / scale_i[:, None])
    out_iw[:, d:] = 0
    out_iw[:, -16:-12] = scale_i[:, None].view(np.uint8)


def fp8_unpack(x_iw, d: int) -> np.ndarray:
    """fp32 [i, d]: the values of packed rows x_iw uint8 [i, fp8_width(d)]."""
    scale_i = np.ascontiguousarray(x_iw[:, -16:-12]).view(np.float32)
    with np.errstate(all="ignore"):
        return decode(x_iw[:, :d]) * scale_i
