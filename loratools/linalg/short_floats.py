"""Floats of 8 and 16 bits to fp32 and back on NumPy, exactly, at a speed that does not depend on the values.

NumPy's own casts take one path per element, and a subnormal costs several times what another number does. Small
updates are full of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from loratools.leaf import ITEMSIZE, Array

BLOCK = 1 << 16  # entries worked on at once: what they need stays in the cache
_LOOKED_UP = 1 << 16  # entries looked up at once; NumPy makes 64-bit indices first
_SAMPLE = 512  # entries, at most
_SMALLEST = np.float32(2.0**-14)  # of the normal fp16 numbers
_BEYOND = np.float32(65520.0)  # from here on rounding gives infinity
_EXPONENT, _SIGN = np.int32(0x7F800000), np.int16(-0x8000)


def widened(x: Array, name: str) -> Array:
    """Return floats of the named short dtype in fp32, laid out as they are; what is not short comes back unchanged.

    Cost: about 1 ms per million.
    """
    if x.dtype.byteorder == ">" or x.ndim == 0:
        return x
    if name == "bfloat16":
        bits = x.view(np.uint16).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if name == "float16" or name.startswith("float8"):
        return _looked_up(x.view(f"u{x.itemsize}"), _values(name, x.dtype))
    return x


@cache
def _values(name: str, dtype: Any) -> Array:
    """Return the fp32 values of all bit patterns of a short float: (256,) or (65536,)."""
    width = ITEMSIZE[name]
    with np.errstate(invalid="ignore"):  # NumPy warns of some NaN patterns
        return np.arange(1 << (8 * width), dtype=f"u{width}").view(dtype).astype(np.float32)


def _looked_up(bits: Array, table: Array) -> Array:
    """Return the entries of a table for bit patterns of any shape, laid out as these are."""
    if not bits.flags.c_contiguous:
        return _looked_up(bits.T, table).T if bits.flags.f_contiguous else np.take(table, bits)
    out = np.empty(bits.shape, np.float32)
    flat, wide = bits.reshape(-1), out.reshape(-1)
    for start in range(0, flat.size, _LOOKED_UP):
        part = slice(start, start + _LOOKED_UP)
        np.take(table, flat[part], out=wide[part], mode="wrap")  # no pattern lies outside; this mode checks least
    return out


def to_float16(x: Array) -> Array:
    """Return fp32 numbers rounded to the nearest fp16, ties to even: bit for bit what the cast gives, NaN included.

    Adding 2^(e+13) to a number of exponent e leaves no room for what lies below 2^(e-10), the spacing of fp16 there
    (for e of at least -14, that of its subnormals), and the sum is rounded as IEEE 754 says. The low bits of the sum
    are then the significand.

    Cost: 2 to 3 ms per million, for blocks that hold a number too large or NaN that of the cast. The cast itself serves
    where a sample shows few subnormals: one call is friendlier to other threads than a dozen.
    """
    flat = np.ascontiguousarray(x).reshape(-1)
    sample = np.abs(flat[:: 1 + flat.size // _SAMPLE])
    if np.count_nonzero(sample < _SMALLEST) <= sample.size // 32:
        return _cast(x)
    out = np.empty(x.shape, np.float16)
    bits = out.reshape(-1).view(np.int16)
    for start in range(0, flat.size, BLOCK):
        _round_block(flat[start : start + BLOCK], bits[start : start + BLOCK])
    return out


def _round_block(x: Array, out: Array) -> None:
    """Write the fp16 bits of x (n,) in fp32 into out (n,) in int16."""
    size = np.abs(x)
    if not np.max(size, initial=0.0) < _BEYOND:  # NaN too
        out[...] = _cast(x).view(np.int16)
        return
    anchor = np.clip(size, _SMALLEST, _BEYOND)
    significand, exponent = size.view(np.int32), anchor.view(np.int32)
    exponent &= _EXPONENT
    exponent += np.int32(13 << 23)
    size += anchor
    significand -= exponent
    exponent >>= 13  # to its place in fp16, but for a constant of 126 << 10, which is -2048 in 16 bits
    significand += exponent
    np.copyto(out, significand, casting="unsafe")
    out += np.int16(2048)
    sign = (x.view(np.int32) >> 16).astype(np.int16)
    sign &= _SIGN
    out |= sign


def _cast(x: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for them
        return x.astype(np.float16)
