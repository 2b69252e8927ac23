"""Packed codes as values, level[code] * scale, a cache's worth of rows at a time.

:func:`textbook` says what is meant. :func:`values` gives the same bits: a value is one fp32 product, rounded once to
its dtype, so it may as well be computed once per level and scale and then looked up, per byte of codes where these do
not straddle bytes; and one bit is the scale itself, with a sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from loratools.leaf import Array
from loratools.linalg.bits import byte_codes, check, lanes, unpack
from loratools.linalg.levels import HALF, decoded, levels
from loratools.linalg.namespace import cast, device_of, down, namespace, up
from loratools.linalg.scales import spread

BLOCK = 1 << 18  # values worked on at once: fewer, and threads wait for each other between the calls
FEW = 4  # a table pays where it has at most a quarter of the entries that look there

Rule = Callable[[Array, Array], Array]  # packed rows, their scales -> values


def textbook(packed: Array, scale: Array, bits: int, count: int, *, group: int, book: int, dtype: str) -> Array:
    """Return level[code] * scale (k, count), multiplied in fp32 and rounded once to ``dtype``.

    ``packed`` (k, bytes) holds ``bits`` per code, ``scale`` (k, groups) fp32 has one number per ``group`` of a row's
    entries (0: one per row), ``book`` names the levels. Raises FormatError for another number of bytes.
    """
    level = _halves(packed) if bits == HALF else decoded(unpack(packed, bits, count), bits, book)
    return down(level * spread(scale, count, group), dtype)


def _halves(packed: Array) -> Array:
    """Return plainly stored fp16 values, in fp32."""
    xp = namespace(packed)
    return up(xp.asarray(packed, copy=True).view(xp.float16))


def values(
    packed: Array, scale: Array, bits: int, count: int, *, group: int, book: int, dtype: str
) -> Iterator[tuple[int, Array]]:
    """Yield (first row, values (rows, count)): together the bits of :func:`textbook`.

    Cost about 0.3 ns per value for one bit, 1 ns where values are looked up, 4 ns in fp16 where each is rounded.
    """
    check(packed, bits, count)
    rule = _rule(packed, bits, count, group, book, dtype)
    step = max(1, BLOCK // max(count, 1))
    for i in range(0, packed.shape[0], step):
        yield i, rule(packed[i : i + step, :], scale[i : i + step, :])


def _rule(like: Array, bits: int, count: int, group: int, book: int, dtype: str) -> Rule:
    """Return the cheapest way to the values: by sign, by looking up bytes or codes, or by multiplying."""
    if bits == 1:
        return _signed(like, count, group, dtype)
    many, whole = lanes(bits)
    if not group and whole == 1 and many > 1 and 256 * many <= count:
        return _by_byte(levels(bits, book, like), bits, count, dtype)
    if FEW << bits <= (group or count):
        return _by_code(levels(bits, book, like), bits, count, group, dtype)
    return lambda packed, scale: textbook(packed, scale, bits, count, group=group, book=book, dtype=dtype)


def _signed(like: Array, count: int, group: int, dtype: str) -> Rule:
    """One bit: the scale, rounded to the dtype, with its sign turned where the bit is 0."""
    xp = namespace(like)
    zero = _as_int(down(xp.zeros((1, 1), dtype=xp.float32, device=device_of(like)), dtype))
    turned = xp.where(byte_codes(1, like) > 0, zero, zero + xp.iinfo(zero.dtype).min)

    def rule(packed: Array, scale: Array) -> Array:
        size = down(scale, dtype)
        sign = xp.take(turned, cast(packed.reshape(-1), "int64"), axis=0).reshape(packed.shape[0], -1)
        return (sign[:, :count] ^ spread(_as_int(size), count, group)).view(size.dtype)

    return rule


def _as_int(x: Array) -> Array:
    """Return a view of floats as signed integers of their width."""
    return x.view(getattr(namespace(x), f"int{8 * x.dtype.itemsize}"))


def _by_byte(table: Array, bits: int, count: int, dtype: str) -> Rule:
    """Several codes in a byte: their values at once, from a table of 256 bytes per row."""
    xp = namespace(table)
    codes = cast(byte_codes(bits, table).reshape(-1), "int64")
    many = lanes(bits)[0]

    def rule(packed: Array, scale: Array) -> Array:
        k = packed.shape[0]
        wide = xp.take(down(table[None, :] * scale, dtype), codes, axis=1).reshape(k * 256, many)
        row = xp.arange(k, dtype=xp.int64, device=device_of(packed))[:, None]
        index = (cast(packed, "int64") + (row << 8)).reshape(-1)
        return xp.take(wide, index, axis=0).reshape(k, -1)[:, :count]

    return rule


def _by_code(table: Array, bits: int, count: int, group: int, dtype: str) -> Rule:
    """One code after the other, from a table per row or group."""
    xp = namespace(table)
    entry = xp.arange(count, dtype=xp.int64, device=device_of(table))
    at = (entry // min(group, count) if group else entry * 0) << bits

    def rule(packed: Array, scale: Array) -> Array:
        k, groups = scale.shape
        ready = down(table * scale.reshape(-1)[:, None], dtype).reshape(-1)
        row = xp.arange(k, dtype=xp.int64, device=device_of(packed))[:, None] * (groups << bits)
        index = cast(unpack(packed, bits, count), "int64") + (at + row if group else row)
        return xp.take(ready, index.reshape(-1)).reshape(k, count)

    return rule
