"""Gram matrices of factors, in fp32 or fp64, with sums in fp64."""

from __future__ import annotations

from typing import NamedTuple

from loratools.leaf import Array
from loratools.linalg.namespace import namespace, overflow_checked, up

BLOCK = 2048
"""Rows per block: long enough for BLAS, short enough for fp32 sums."""


class Precision(NamedTuple):
    """How Gram matrices are formed; ``noise`` is the size of the errors in sigma^2, relative to |G_a| |G_b|.

    ``noise`` was measured on steep, flat, misaligned and rank-deficient factors; ``faint`` is a squared channel norm
    below which the squares of its entries may have underflowed.
    """

    dtype: str
    noise: float
    faint: float


FP32 = Precision("float32", noise=2e-7, faint=1e-25)
FP64 = Precision("float64", noise=3e-15, faint=0.0)


def cross(x: Array, y: Array, dtype: str = "float32") -> Array:
    """Return ``x^T y`` in fp64: x (..., n, r), y (..., n, s) -> (..., r, s).

    Blocks of rows are multiplied in ``dtype`` and summed in fp64. Guarantee, entry by entry and in fp32: the error is
    about 1e-7 |x_i| |y_j|. ``cross(x, x)`` costs half (BLAS sees one array and its transpose). Overflow gives inf.
    """
    xp = namespace(x, y)
    total = 0.0
    with overflow_checked():
        for start in range(0, x.shape[-2], BLOCK):
            left = up(x[..., start : start + BLOCK, :], dtype)
            right = left if x is y else up(y[..., start : start + BLOCK, :], dtype)
            total = total + up(xp.matrix_transpose(left) @ right, "float64")
    return total


def grams(b: Array, a: Array, dtype: str) -> tuple[Array, Array]:
    """Return ``b^T b`` and ``a a^T``, both (R, R) in fp64."""
    wide = a.mT
    return cross(b, b, dtype), cross(wide, wide, dtype)
