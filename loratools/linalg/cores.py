"""The R x R work of many products at once: spectra out of Gram matrices, whether to trust them, balanced factors.

With G_a = a a^T = L L^T and G_b = b^T b, the matrix L^T G_b L has the eigenpairs (sigma^2, V) of the product b a.
U = b (L V / sigma) are its left singular vectors and U^T b a = (L V / sigma)^T G_b a, so both truncated factors are the
given ones times something small: no inverse, and no QR of anything tall. Squaring loses half the digits: results come
with the size of their errors, and :func:`trusted` says whether that is small enough.

Small matrices cost more in calls than in arithmetic, so that everything here takes a batch; each member gets the bits
that it would get alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import nan
from typing import NamedTuple

from loratools.leaf import Array
from loratools.linalg.gram import Precision, grams
from loratools.linalg.namespace import cholesky, namespace, overflow_checked

BALANCE = 1e-3
"""How far from orthonormal a kept direction may be."""

EXCESS = 1e-6
"""Allowed error beyond the optimum, relative to the norm of the product."""


class Cores(NamedTuple):
    """Spectra of p products ``scale * b @ a`` of one inner dimension R, and what their vectors are made of.

    ``s (p, c)`` in fp64, descending, c = min(R, m, n). With b' = scale b / gauge, a' = gauge a, channels equally long:
    ``lv (p, R, c)`` = L V, ``gb (p, R, R)`` = b'^T b', ``gauge (p, R)``, ``scale (p,)``. ``noise (p,)`` is the
    absolute size of the errors in s^2; 0 if and only if a factor is zero, NaN where the Gram matrices broke down.
    """

    s: Array
    lv: Array
    gb: Array
    gauge: Array
    scale: Array
    noise: Array


def spectra(pairs: Sequence[tuple[Array, Array]], scales: Sequence[float], precision: Precision) -> Cores:
    """Return the spectra of ``scale * b @ a``: every b (m, R), a (R, n) of one R and of one min(R, m, n).

    Cost (m + n) R^2 multiply-adds and one R x R eigendecomposition for each.
    """
    xp = namespace(*pairs[0])
    gb, ga = (xp.stack(each) for each in zip(*(grams(b, a, precision.dtype) for b, a in pairs), strict=True))
    nb, na = xp.linalg.diagonal(gb), xp.linalg.diagonal(ga)
    sound = xp.all(xp.isfinite(nb) & xp.isfinite(na), axis=-1)
    for i, odd in enumerate(_tolist(_underflowed(nb, na, precision.faint))):
        if odd and not (_is_zero(nb[i, :], pairs[i][0]) or _is_zero(na[i, :], pairs[i][1])):
            sound[i] = False
    count = min(*pairs[0][0].shape, *pairs[0][1].shape)
    return of_grams(gb, ga, count, xp.where(sound, precision.noise, nan), scales)


def of_grams(gb: Array, ga: Array, count: int, noise: Array | float, scales: Sequence[float]) -> Cores:
    """Return the ``count`` leading values out of Gram matrices (p, R, R) in fp64.

    ``noise (p,)`` is how well these are known, relative to their sizes; NaN for those to be left out.
    """
    xp = namespace(gb, ga)
    device = gb.device
    scale = xp.asarray(list(scales), dtype=xp.float64, device=device)
    noise = noise + xp.zeros_like(scale)
    gb, ga = (_sound(g, noise) for g in (gb, ga))
    gauge = _gauge(xp.linalg.diagonal(gb), xp.linalg.diagonal(ga))
    with overflow_checked():
        gb = gb * (scale[:, None, None] / gauge[:, :, None]) * (scale[:, None, None] / gauge[:, None, :])
        ga = ga * gauge[:, :, None] * gauge[:, None, :]
        size = xp.linalg.matrix_norm(ga) * xp.linalg.matrix_norm(gb)
        noise = xp.where(xp.isfinite(size), noise, nan)  # as large as its core
    factor, noise = _roots(_sound(ga, noise), noise, size)
    gb = _sound(gb, noise)
    energies, v = xp.linalg.eigh(factor.mT @ gb @ factor)
    s = xp.sqrt(xp.clip(xp.flip(energies, axis=-1)[:, :count], 0.0, None))
    return Cores(s, factor @ xp.flip(v, axis=-1)[:, :, :count], gb, gauge, scale, noise * size)


def balanced(found: Cores, i: int, k: int) -> tuple[Array, Array]:
    """Return (R, k) and (k, R) in fp64: b @ the first and the second @ a are the balanced factors of product i."""
    lv, s, gauge = found.lv[i, :, :k], found.s[i, :k], found.gauge[i, :]
    return lv * s**-0.5 * (found.scale[i] / gauge[:, None]), (lv * s**-1.5).mT @ found.gb[i, :, :] * gauge


def trusted(s: Array, noise: Array, ranks: Sequence[int], chooses: Sequence[Callable[[Array], int]]) -> list[bool]:
    """Tell of every product whether the noise leaves its first directions, the error of the cut and the rank right.

    ``s (p, c)`` and ``noise (p,)`` of :class:`Cores`; ``ranks``: what ``chooses`` say of the spectra. False where the
    Gram matrices broke down, or a factor is zero.
    """
    xp, count = namespace(s), s.shape[1]
    energies, k, kept = s**2, xp.asarray(list(ranks), device=s.device), _kept(s, ranks)
    total, tail = xp.sum(energies, axis=1), xp.sum(xp.where(kept, 0.0, energies), axis=1)
    least = xp.min(xp.where(kept, energies, xp.inf), axis=1)
    inverse = xp.sum(xp.where(kept & (energies > 0), 1 / xp.where(energies > 0, energies, 1.0), 0.0), axis=1)
    drift = noise**2 * inverse  # squared error inside the kept directions
    excess = xp.sqrt(tail + drift) - xp.sqrt(tail)
    # the trace is far more accurate than its terms, so the tail errs as the smaller of its two parts does
    rest = noise * xp.where(k < count - k, k, count - k)
    told = (tail >= 1e3 * rest) | (rest <= EXCESS**2 * total)  # else the reported error would be mostly noise
    fine = (noise > 0) & (noise <= BALANCE * least) & (excess <= EXCESS * xp.sqrt(total)) & told
    shift = noise[:, None] * xp.where(kept, 1.0, -1.0)
    more, less = (xp.sqrt(xp.clip(energies + d, 0.0, None)) for d in (shift, -shift))
    return [  # worst cases for every rule that weighs kept against cut
        ok and choose(more[i, :]) == choose(less[i, :]) == rank
        for i, (ok, choose, rank) in enumerate(zip(_tolist(fine), chooses, ranks, strict=True))
    ]


def figures(s: Array, ranks: Sequence[int]) -> list[tuple[float, float]]:
    """Return of every spectrum in ``s (p, c)`` the share of the energy in its first values, and the relative error."""
    xp = namespace(s)
    squares = (s / xp.where(s[:, :1] > 0, s[:, :1], 1.0)) ** 2  # the quotient keeps the squares in range
    total, tail = xp.sum(squares, axis=1), xp.sum(xp.where(_kept(s, ranks), 0.0, squares), axis=1)
    beyond = tail / xp.where(total > 0, total, 1.0)
    return list(zip((1.0 - beyond).tolist(), xp.sqrt(beyond).tolist(), strict=True))


def _kept(s: Array, ranks: Sequence[int]) -> Array:
    """Return the mask (p, c) of the first ``ranks`` values of every spectrum."""
    xp = namespace(s)
    return xp.arange(s.shape[1], device=s.device) < xp.asarray(list(ranks), device=s.device)[:, None]


def _tolist(x: Array) -> list[bool]:
    return [bool(one) for one in x.tolist()]


def _sound(g: Array, noise: Array) -> Array:
    """Return Gram matrices with those that are to be left out replaced by the identity."""
    xp = namespace(g)
    out = xp.isnan(noise)
    unit = xp.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    return xp.where(out[:, None, None], unit, g) if bool(xp.any(out)) else g


def _roots(g: Array, noise: Array, size: Array) -> tuple[Array, Array]:
    """Return lower L (p, R, R) with L L^T = g, and the noise, NaN where there is no such L.

    A rank-deficient g is first lifted by its own rounding errors; a zero one (of no ``size``) has the root zero.
    """
    xp = namespace(g)
    factor = cholesky(g)
    if factor is not None:
        return factor, noise
    found = [_root(g[i, :, :], float(noise[i]), float(size[i])) for i in range(g.shape[0])]
    unit = xp.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    lost = xp.asarray([one is None for one in found], device=g.device)
    return xp.stack([unit if one is None else one for one in found]), xp.where(lost, nan, noise)


def _root(g: Array, noise: float, size: float) -> Array | None:
    xp, factor = namespace(g), cholesky(g)
    if factor is not None or not size:
        return xp.zeros_like(g) if factor is None else factor
    return cholesky(g + noise * float(xp.linalg.matrix_norm(g)) * xp.eye(g.shape[0], dtype=g.dtype, device=g.device))


def _underflowed(nb: Array, na: Array, faint: float) -> Array:
    """Tell (p,) whether squared channel norms are too small to be right although their partners are not, or all are."""
    xp = namespace(nb, na)
    lone = xp.any((nb < faint) != (na < faint), axis=-1)
    return lone | xp.all(nb <= faint, axis=-1) | xp.all(na <= faint, axis=-1)


def _is_zero(norms: Array, factor: Array) -> bool:
    """Tell whether a factor is zero; its squares alone may have underflowed."""
    xp = namespace(norms)
    return not bool(xp.any(norms != 0)) and not bool(xp.any(factor != 0))


def _gauge(nb: Array, na: Array) -> Array:
    """Return (nb / na)^(1/4), and 1 for a dead channel: channel i of b / gauge is then as long as that of gauge a."""
    xp = namespace(nb, na)
    alive = (nb > 0) & (na > 0)
    return xp.where(alive, xp.where(alive, nb, 1.0) / xp.where(alive, na, 1.0), 1.0) ** 0.25
