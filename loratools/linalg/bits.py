"""Packing small codes into bytes and out again, row by row: code i of a row lies in bits i * b onwards.

Little end first, the same order as :func:`loratools.linalg.namespace.unpack_bits`, which is the reference; every row
begins a byte.
"""

from __future__ import annotations

from math import gcd

from loratools.errors import FormatError
from loratools.leaf import Array
from loratools.linalg.levels import levels
from loratools.linalg.namespace import cast, device_of, namespace


def row_bytes(count: int, bits: int) -> int:
    """Return the bytes of a row of ``count`` codes."""
    return -(-count * bits // 8)


def pack(codes: Array, bits: int) -> Array:
    """Return codes (k, n) of ``bits`` (1 to 16) each as bytes, uint8 (k, row_bytes(n, bits))."""
    xp, (k, n) = namespace(codes), codes.shape
    wide = codes if bits <= 8 else cast(codes, "int32")
    lanes, width = _lanes(bits)
    pad = -n % lanes
    if pad:
        wide = xp.concat([wide, xp.zeros((k, pad), dtype=wide.dtype, device=device_of(codes))], axis=1)
    out = xp.zeros((k, wide.shape[1] // lanes * width), dtype=xp.uint8, device=device_of(codes))
    for i in range(lanes):
        byte, shift = divmod(i * bits, 8)
        lane = wide[:, i::lanes]
        out[:, byte::width] |= cast((lane << shift) & 255, "uint8")
        for at in range(1, (shift + bits + 7) // 8):
            out[:, byte + at :: width] |= cast((lane >> (8 * at - shift)) & 255, "uint8")
    return out[:, : row_bytes(n, bits)]


def unpack(packed: Array, bits: int, count: int) -> Array:
    """Return the codes (k, count), uint8 (int32 above 8 bits), of packed rows; FormatError for another length."""
    _check(packed, bits, count)
    xp, k = namespace(packed), packed.shape[0]
    lanes, width = _lanes(bits)
    packed = _padded(packed, width)
    packed = packed if bits <= 8 else cast(packed, "int32")
    out = xp.zeros((k, packed.shape[1] // width * lanes), dtype=packed.dtype, device=device_of(packed))
    for i in range(lanes):
        byte, shift = divmod(i * bits, 8)
        lane = packed[:, byte::width] >> shift
        for at in range(1, (shift + bits + 7) // 8):
            lane = lane | (packed[:, byte + at :: width] << (8 * at - shift))
        out[:, i::lanes] = lane & ((1 << bits) - 1)
    return out[:, :count]


def unpack_levels(packed: Array, bits: int, count: int, book: int) -> Array:
    """Return the levels, fp32 (k, count), of packed rows: one look-up per byte where codes do not straddle bytes."""
    lanes, width = _lanes(bits)
    if width > 1:
        codes = unpack(packed, bits, count)
        return _taken(levels(bits, book, packed), codes)
    _check(packed, bits, count)
    xp = namespace(packed)
    byte = xp.arange(256, dtype=xp.int64, device=device_of(packed))
    lane = xp.stack([(byte >> (i * bits)) & ((1 << bits) - 1) for i in range(lanes)], axis=1)
    table = _taken(levels(bits, book, packed), lane)
    out = xp.take(table, cast(packed.reshape(-1), "int64"), axis=0)
    return out.reshape(packed.shape[0], -1)[:, :count]


def unpack_from(table: Array, packed: Array, bits: int, count: int) -> Array:
    """Return table[row, code] (k, count), in the dtype of ``table`` (k, 2^bits), for the codes of packed rows.

    One look-up per byte where codes do not straddle bytes. Cost below 1 ns per entry for 1 bit.
    """
    _check(packed, bits, count)
    xp, k = namespace(packed), packed.shape[0]
    lanes, width = _lanes(bits)
    row = xp.arange(k, dtype=xp.int64, device=device_of(packed))[:, None]
    if width > 1 or lanes == 1:
        codes = packed if lanes == 1 else unpack(packed, bits, count)
        return xp.take(table.reshape(-1), (cast(codes, "int64") + (row << bits)).reshape(-1)).reshape(k, count)
    byte = xp.arange(256, dtype=xp.int64, device=device_of(packed))
    lane = xp.stack([(byte >> (i * bits)) & ((1 << bits) - 1) for i in range(lanes)], axis=1)
    wide = xp.take(table, lane.reshape(-1), axis=1).reshape(k * 256, lanes)
    index = (cast(packed, "int64") + (row << 8)).reshape(-1)
    return xp.take(wide, index, axis=0).reshape(k, -1)[:, :count]


def _taken(table: Array, codes: Array) -> Array:
    return namespace(table).take(table, cast(codes.reshape(-1), "int64")).reshape(codes.shape)


def _lanes(bits: int) -> tuple[int, int]:
    """Return after how many codes a byte ends evenly, and after how many bytes."""
    common = gcd(8, bits)
    return 8 // common, bits // common


def _check(packed: Array, bits: int, count: int) -> None:
    if packed.ndim != 2 or packed.shape[1] != row_bytes(count, bits):
        raise FormatError("packed codes have another length", expected=row_bytes(count, bits), got=tuple(packed.shape))


def _padded(packed: Array, width: int) -> Array:
    pad = -packed.shape[1] % width
    if not pad:
        return packed
    xp = namespace(packed)
    zeros = xp.zeros((packed.shape[0], pad), dtype=xp.uint8, device=device_of(packed))
    return xp.concat([packed, zeros], axis=1)
