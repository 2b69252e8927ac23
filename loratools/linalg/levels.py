"""The levels of low-bit codes: those of a Gaussian, or evenly spaced ones."""

from __future__ import annotations

from loratools.leaf import Array
from loratools.linalg.lloyd_max import GAUSS
from loratools.linalg.namespace import cast, device_of, namespace, up

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
HALF = 16  # "bits" of a vector stored as plain fp16 values
GAUSS_BOOK, EVEN_BOOK = 0, 1
CELLS, REACH = 64, 8  # cells per unit, so fine that no two borders share one, up to 8 on both sides
DISTORTION = {
    1: 0.36338, 2: 0.11748, 3: 0.034548, 4: 0.009501, 5: 0.0025047, 6: 6.4423e-4, 7: 1.6347e-4, 8: 4.1172e-5,
    9: 2.2e-5, 10: 5.6e-6, 11: 1.4e-6, 12: 3.5e-7,
}  # fmt: skip
"""Mean squared error for a unit Gaussian, by bits; above 8 of even levels that reach 4.2 deviations."""


def is_even(bits: int, book: int) -> bool:
    """True where the levels are evenly spaced: those of that book, and all above 8 bits."""
    return bits > 8 or (book == EVEN_BOOK and bits > 1)


def levels(bits: int, book: int, like: Array) -> Array:
    """Return the 2^bits levels, ascending, fp32: level c is what code c stands for, before its scale."""
    half = tuple(i + 0.5 for i in range(1 << (bits - 1))) if is_even(bits, book) else GAUSS[bits]
    xp = namespace(like)
    return up(
        xp.asarray([*(-v for v in reversed(half)), *half], dtype=xp.float64, device=getattr(like, "device", None))
    )


def nearest(x: Array, bits: int, book: int) -> Array:
    """Return the code (uint8; int32 above 8 bits) of the level nearest to every entry of x / scale (fp32)."""
    xp = namespace(x)
    if bits == 1:
        return cast(x >= 0, "uint8")
    if is_even(bits, book):
        top = (1 << bits) - 1
        return cast(xp.clip(xp.floor(x) + (1 << (bits - 1)), 0, top), "uint8" if bits <= 8 else "int32")
    table = levels(bits, book, x)
    return cast(_above((table[1:] + table[:-1]) / 2, x), "uint8")


def _above(borders: Array, x: Array) -> Array:
    """Return how many of the ascending borders lie below every entry of x, as searchsorted does, but in fewer steps.

    A table tells the borders below the entry's cell; at most one more lies within the cell.
    """
    xp = namespace(x)
    cells = xp.astype(xp.arange(-REACH * CELLS, REACH * CELLS, device=device_of(x)), borders.dtype) / CELLS
    before = xp.searchsorted(borders, cells)
    within = xp.concat([borders, xp.full((1,), xp.inf, dtype=borders.dtype, device=device_of(x))])
    cell = xp.clip(xp.floor(x * CELLS) + REACH * CELLS, 0, 2 * REACH * CELLS - 1)
    at = (cast(cell, "int64") & (2 * REACH * CELLS - 1)).reshape(-1)  # the mask keeps what NaN becomes in the table
    found = xp.take(before, at)
    return (found + (x.reshape(-1) > xp.take(within, found))).reshape(x.shape)


def decoded(codes: Array, bits: int, book: int) -> Array:
    """Return the level (fp32) of every code."""
    xp = namespace(codes)
    table = levels(bits, book, codes)
    return xp.take(table, cast(codes.reshape(-1), "int64")).reshape(codes.shape)


def snapped(x: Array, bits: int, book: int) -> Array:
    """Return the level nearest to every entry of x: what :func:`decoded` makes of :func:`nearest`, in fewer passes."""
    xp = namespace(x)
    if bits == 1:
        return xp.copysign(xp.ones_like(x), x)
    if is_even(bits, book):
        top = (1 << (bits - 1)) - 0.5
        return xp.clip(xp.floor(x) + 0.5, -top, top)
    if bits > 2:
        return decoded(nearest(x, bits, book), bits, book)
    inner, outer = GAUSS[2]
    return xp.copysign(xp.where(xp.abs(x) > (inner + outer) / 2, xp.full_like(x, outer), xp.full_like(x, inner)), x)
