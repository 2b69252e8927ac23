"""Gram matrices of factors, and the spectrum of a product ``b @ a`` out of them.

With G_a = a a^T = L L^T and G_b = b^T b, the R x R matrix L^T G_b L has the eigenpairs (sigma^2, V) of the product.
U = b (L V / sigma) are its left singular vectors and U^T b a = (L V / sigma)^T G_b a, so both truncated factors are the
given ones times something small: no inverse, and no QR of anything tall. Squaring loses half the digits: results come
with the size of their errors, and :func:`trusted` says whether that is small enough.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import NamedTuple

from loratools.leaf import Array
from loratools.linalg.namespace import cholesky, namespace, overflow_checked, up

BLOCK = 2048
"""Rows per block: long enough for BLAS, short enough for fp32 sums."""

BALANCE = 1e-3
"""How far from orthonormal a kept direction may be."""

EXCESS = 1e-6
"""Allowed error beyond the optimum, relative to the norm of the product."""


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


class Spectrum(NamedTuple):
    """Spectrum of ``scale * b @ a`` and what its vectors are made of, in the gauge of equally long channels.

    ``s (c,)`` in fp64, descending, c = min(R, m, n). With b' = scale b / gauge, a' = gauge a: ``lv (R, c)`` = L V and
    ``gb (R, R)`` = b'^T b'. ``noise`` is the absolute size of the errors in s^2; 0 if and only if a factor is zero.
    """

    s: Array
    lv: Array
    gb: Array
    gauge: Array
    scale: float
    noise: float


def cross(x: Array, y: Array, dtype: str = "float32") -> Array:
    """Return ``x^T y`` in fp64: x (..., n, r), y (..., n, s) -> (..., r, s).

    Blocks of rows are multiplied in ``dtype`` and summed in fp64. Guarantee, entry by entry and in fp32: the error is
    about 1e-7 |x_i| |y_j|. ``cross(x, x)`` costs half (BLAS sees one array and its transpose). Overflow gives inf.
    """
    xp = namespace(x, y)
    total = 0.0
    for start in range(0, x.shape[-2], BLOCK):
        left = up(x[..., start : start + BLOCK, :], dtype)
        right = left if x is y else up(y[..., start : start + BLOCK, :], dtype)
        with overflow_checked():
            total = total + up(xp.matrix_transpose(left) @ right, "float64")
    return total


def grams(b: Array, a: Array, dtype: str) -> tuple[Array, Array]:
    """Return ``b^T b`` and ``a a^T``, both (R, R) in fp64."""
    wide = a.mT
    return cross(b, b, dtype), cross(wide, wide, dtype)


def spectrum(b: Array, a: Array, precision: Precision, scale: float = 1.0) -> Spectrum | None:
    """Return the spectrum of ``scale * b @ a``, b (m, R), a (R, n), or None where the Gram matrices break down.

    Cost (m + n) R^2 multiply-adds and one R x R eigendecomposition.
    """
    xp = namespace(b, a)
    gb, ga = grams(b, a, precision.dtype)
    nb, na = xp.linalg.diagonal(gb), xp.linalg.diagonal(ga)
    if not bool(xp.all(xp.isfinite(nb) & xp.isfinite(na))):
        return None
    if _underflowed(nb, na, precision.faint) and not (_is_zero(nb, b) or _is_zero(na, a)):
        return None
    return of_grams(gb, ga, min(*b.shape, *a.shape), precision.noise, scale)


def of_grams(gb: Array, ga: Array, count: int, noise: float, scale: float = 1.0) -> Spectrum | None:
    """Return the ``count`` leading values out of the Gram matrices, known to ``noise`` relative to their sizes."""
    xp = namespace(gb, ga)
    gauge = _gauge(xp.linalg.diagonal(gb), xp.linalg.diagonal(ga))
    gb, ga = gb * (scale / gauge[:, None]) * (scale / gauge), ga * gauge[:, None] * gauge
    size = float(xp.linalg.matrix_norm(ga)) * float(xp.linalg.matrix_norm(gb))
    factor = _root(ga, noise) if size else xp.zeros_like(ga)
    if factor is None:
        return None
    energies, v = xp.linalg.eigh(factor.mT @ gb @ factor)
    s = xp.sqrt(xp.clip(xp.flip(energies)[:count], 0.0, None))
    return Spectrum(s, factor @ xp.flip(v, axis=1)[:, :count], gb, gauge, scale, noise * size)


def balanced(found: Spectrum, k: int) -> tuple[Array, Array]:
    """Return (R, k) and (k, R) in fp64: b @ the first and the second @ a are the balanced factors of rank k."""
    lv, s = found.lv[:, :k], found.s[:k]
    return lv * s**-0.5 * (found.scale / found.gauge[:, None]), (lv * s**-1.5).mT @ found.gb * found.gauge


def trusted(found: Spectrum, k: int, choose: Callable[[Array], int]) -> bool:
    """Tell whether the noise leaves the first k directions, the error of the cut and the choice of k right."""
    xp = namespace(found.s)
    energies, noise = found.s**2, found.noise
    total, tail = float(xp.sum(energies)), float(xp.sum(energies[k:]))
    if noise > BALANCE * float(energies[k - 1]):
        return False
    drift = noise**2 * float(xp.sum(1 / energies[:k]))  # squared error inside the kept directions
    if sqrt(tail + drift) - sqrt(tail) > EXCESS * sqrt(total):
        return False
    # the trace is far more accurate than its terms, so the tail errs as the smaller of its two parts does
    rest = noise * min(k, found.s.shape[0] - k)
    if tail < 1e3 * rest and rest > EXCESS**2 * total:  # the reported error would be mostly noise
        return False
    shift = noise * xp.where(xp.arange(energies.shape[0], device=energies.device) < k, 1.0, -1.0)
    more, less = (xp.sqrt(xp.clip(energies + d, 0.0, None)) for d in (shift, -shift))
    return choose(more) == choose(less) == k  # worst cases for every rule that weighs kept against cut


def _underflowed(nb: Array, na: Array, faint: float) -> bool:
    """Tell whether squared channel norms are too small to be right although their partners are not, or all of them."""
    xp = namespace(nb, na)
    return not bool(xp.all((nb < faint) == (na < faint)) and xp.any(nb >= faint))


def _is_zero(norms: Array, factor: Array) -> bool:
    """Tell whether a factor is zero; its squares alone may have underflowed."""
    xp = namespace(norms)
    return not bool(xp.any(norms != 0)) and not bool(xp.any(factor != 0))


def _gauge(nb: Array, na: Array) -> Array:
    """Return (nb / na)^(1/4), and 1 for a dead channel: channel i of b / gauge is then as long as that of gauge a."""
    xp = namespace(nb, na)
    alive = (nb > 0) & (na > 0)
    return xp.where(alive, xp.where(alive, nb, 1.0) / xp.where(alive, na, 1.0), 1.0) ** 0.25


def _root(g: Array, noise: float) -> Array | None:
    """Return lower L with L L^T = g; a rank-deficient g is first lifted by its own rounding errors."""
    factor = cholesky(g)
    if factor is not None:
        return factor
    xp = namespace(g)
    return cholesky(g + noise * float(xp.linalg.matrix_norm(g)) * xp.eye(g.shape[0], dtype=g.dtype, device=g.device))
