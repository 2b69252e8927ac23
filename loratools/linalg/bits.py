"""Packing small codes into bytes and out again, row by row: code i of a row lies in bits i * b onwards.

Little end first, the same order as :func:`loratools.linalg.namespace.unpack_bits`, which is the reference; every row
begins a byte.
"""

from __future__ import annotations

from math import gcd

from loratools.errors import FormatError
from loratools.leaf import Array
from loratools.linalg.namespace import cast, device_of, namespace


def row_bytes(count: int, bits: int) -> int:
    """Return the bytes of a row of ``count`` codes."""
    return -(-count * bits // 8)


def pack(codes: Array, bits: int) -> Array:
    """Return codes (k, n) of ``bits`` (1 to 16) each as bytes, uint8 (k, row_bytes(n, bits))."""
    xp, (k, n) = namespace(codes), codes.shape
    wide = codes if bits <= 8 else cast(codes, "int32")
    many, width = lanes(bits)
    pad = -n % many
    if pad:
        wide = xp.concat([wide, xp.zeros((k, pad), dtype=wide.dtype, device=device_of(codes))], axis=1)
    out = xp.zeros((k, wide.shape[1] // many * width), dtype=xp.uint8, device=device_of(codes))
    for i in range(many):
        byte, shift = divmod(i * bits, 8)
        lane = wide[:, i::many]
        out[:, byte::width] |= cast((lane << shift) & 255, "uint8")
        for at in range(1, (shift + bits + 7) // 8):
            out[:, byte + at :: width] |= cast((lane >> (8 * at - shift)) & 255, "uint8")
    return out[:, : row_bytes(n, bits)]


def unpack(packed: Array, bits: int, count: int) -> Array:
    """Return the codes (k, count), uint8 (int32 above 8 bits), of packed rows; FormatError for another length."""
    check(packed, bits, count)
    if bits == 8:
        return packed
    xp, k = namespace(packed), packed.shape[0]
    many, width = lanes(bits)
    packed = _padded(packed, width)
    packed = packed if bits <= 8 else cast(packed, "int32")
    out = xp.zeros((k, packed.shape[1] // width * many), dtype=packed.dtype, device=device_of(packed))
    for i in range(many):
        byte, shift = divmod(i * bits, 8)
        lane = packed[:, byte::width] >> shift
        for at in range(1, (shift + bits + 7) // 8):
            lane = lane | (packed[:, byte + at :: width] << (8 * at - shift))
        out[:, i::many] = lane & ((1 << bits) - 1)
    return out[:, :count]


def byte_codes(bits: int, like: Array) -> Array:
    """Return the codes (256, codes per byte) that every byte holds, uint8, for sizes that do not straddle bytes."""
    xp = namespace(like)
    byte = xp.arange(256, dtype=xp.uint8, device=device_of(like))
    return xp.stack([(byte >> (i * bits)) & ((1 << bits) - 1) for i in range(lanes(bits)[0])], axis=1)


def lanes(bits: int) -> tuple[int, int]:
    """Return after how many codes a byte ends evenly, and after how many bytes."""
    common = gcd(8, bits)
    return 8 // common, bits // common


def check(packed: Array, bits: int, count: int) -> None:
    """Raise FormatError unless packed rows have the bytes of ``count`` codes."""
    if packed.ndim != 2 or packed.shape[1] != row_bytes(count, bits):
        raise FormatError("packed codes have another length", expected=row_bytes(count, bits), got=tuple(packed.shape))


def _padded(packed: Array, width: int) -> Array:
    pad = -packed.shape[1] % width
    if not pad:
        return packed
    xp = namespace(packed)
    zeros = xp.zeros((packed.shape[0], pad), dtype=xp.uint8, device=device_of(packed))
    return xp.concat([packed, zeros], axis=1)
