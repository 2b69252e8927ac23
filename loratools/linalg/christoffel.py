"""How much of a vector can lie in one eigenvector of G: bounds from a block Krylov space, without the eigenvectors.

Let x be a unit eigenvector of G for mu, and y = basis^T x, so |y| <= 1. Projecting G x = mu x on the basis shows that
all rows of (t - mu) y but the last block vanish: y lies in the b-dimensional space N(mu) spanned by the columns of
(t - mu)^-1 E_last. For h in the span of the basis, with coordinates c, h^T x = c^T y is at most the norm of the
projection of c on N(mu). Its maximum over all real mu bounds the share of h in *every* eigenvector, known or not. It is
the block form of the Christoffel function, and falls with every step.
"""

from __future__ import annotations

from typing import NamedTuple

from loratools.leaf import Array
from loratools.linalg.krylov import Krylov, Ritz, ritz
from loratools.linalg.namespace import cholesky, namespace, solve_triangular

NODES = (0.067, 0.5, 0.933)
"""Where between two Ritz values the bound is evaluated (Chebyshev's nodes); and at every Ritz value itself."""

REFINED = 8
"""Points added on either side of the largest value found between Ritz values."""

CHUNK = 1 << 18
"""Entries of points x Ritz values worked on at a time."""

STEEP = 1e-5
"""Smallest diagonal of a Cholesky factor, relative to 1, that leaves a projection right to six digits."""


class Shares(NamedTuple):
    """Bounds (k,) on max over x of |h^T x|; ``slack`` is what a finer grid added to ``upper``."""

    upper: Array
    lower: Array
    slack: Array


def shares(space: Krylov, c: Array, *, divided: bool = False, blur: float = 0.0) -> Shares:
    """Bound the largest |h_j^T x| over the unit eigenvectors x of G: c (N, k) = basis^T h, in fp64 -> k bounds each.

    ``divided``: bound |h_j^T x| / sqrt(mu) instead, over the positive eigenvalues mu; infinite while the smallest Ritz
    value is not known to be positive. ``blur``: the error of the Krylov relation; Ritz values that close are taken as
    one, because y solves the equations above only so well. The upper bound is rigorous in exact arithmetic, up to the
    grid over mu; the lower one holds where the gaps between Ritz values are those of G. Cost O(N^3 + N^2 b (b + k)).
    """
    found = ritz(space)
    xp = namespace(c)
    f, d = found.z[-space.width :, :], found.z.mT @ c
    low = float(found.theta[0] - found.rho[0]) - blur
    if divided and low <= 0:
        nothing = xp.zeros_like(c[0, :])
        return Shares(nothing + xp.inf, nothing, nothing)
    power = 1.0 if divided else 0.0
    at_ritz = _at_ritz(found, f, d, blur) / (found.theta**power)[:, None]
    points = _grid(found.theta, low if divided else None)
    inner = _projected(found, f, d, points) / (points**power)[:, None]
    finer = _refined(points, xp.argmax(inner, axis=0), like=c)
    peak = xp.max(_projected(found, f, d, finer) / (finer**power)[:, None], axis=0)
    coarse = xp.maximum(xp.max(at_ritz, axis=0), xp.max(inner, axis=0))
    upper = xp.sqrt(xp.maximum(coarse, peak))
    lower = _certain(found, d, xp.linalg.vector_norm(c, axis=0), power, blur)
    return Shares(upper, xp.minimum(lower, upper), upper - xp.sqrt(coarse))


def _grid(theta: Array, low: float | None) -> Array:
    """Return points between neighbouring Ritz values and one interval beyond; down to ``low`` where that is given."""
    xp = namespace(theta)
    below, above = 2 * theta[:1] - theta[1:2], 2 * theta[-1:] - theta[-2:-1]
    edges = xp.concat([below if low is None else xp.zeros_like(below) + low, theta, above])
    nodes = xp.asarray(NODES, dtype=theta.dtype, device=theta.device)
    inner = xp.reshape(edges[:-1, None] + (edges[1:] - edges[:-1])[:, None] * nodes, (-1,))
    return inner if low is None else xp.concat([edges[:1], inner])


def _refined(points: Array, best: Array, *, like: Array) -> Array:
    """Return further points on either side of ``points[best]``."""
    xp = namespace(points)
    left, right = points[xp.clip(best - 1, 0, None)], points[xp.clip(best + 1, None, points.shape[0] - 1)]
    nodes = (xp.arange(2 * REFINED, dtype=like.dtype, device=like.device) + 0.5) / (2 * REFINED)
    return xp.reshape(left[:, None] + (right - left)[:, None] * nodes, (-1,))


def _at_ritz(found: Ritz, f: Array, d: Array, blur: float) -> Array:
    """Return the squared norms at the Ritz values themselves, on a space that holds N(mu): (N, k).

    The Ritz vector (with those closer than ``blur``), and what the others span: this catches atoms too narrow for any
    grid. The Ritz vectors are orthonormal, so the squares add.
    """
    xp, parts = namespace(d), []
    for mu in _chunks(found.theta, f.shape[1]):
        far = found.theta[None, :] - mu[:, None]
        own = xp.abs(far) <= blur
        parts.append(_norms(xp.where(own, 0.0, 1 / xp.where(own, 1.0, far)), f, d) + xp.astype(own, d.dtype) @ d**2)
    return xp.concat(parts)


def _projected(found: Ritz, f: Array, d: Array, points: Array) -> Array:
    """Return the squared norms of the k vectors' projections on N(mu), for all points: (P, k)."""
    xp, parts = namespace(d), []
    for mu in _chunks(points, f.shape[1]):
        far = found.theta[None, :] - mu[:, None]
        parts.append(_norms(1 / xp.where(far == 0, xp.inf, far), f, d))
    return xp.concat(parts)


def _chunks(points: Array, n: int) -> list[Array]:
    height = max(1, CHUNK // n)
    return [points[start : start + height] for start in range(0, points.shape[0], height)]


def _norms(weight: Array, f: Array, d: Array) -> Array:
    """Return |projection of d_j on the span of diag(weight) f^T|^2: weight (P, N), f (b, N), d (N, k) -> (P, k)."""
    xp = namespace(f)
    (b, n), k = f.shape, d.shape[1]
    size = xp.sqrt(weight**2 @ (f**2).mT)  # columns of very different length are brought to one
    size = xp.where(size > 0, size, 1.0)
    gram = xp.reshape(weight**2 @ xp.reshape(f[:, None, :] * f[None, :, :], (b * b, n)).mT, (-1, b, b))
    seen = xp.reshape(weight @ xp.reshape(f[:, None, :] * d.mT[None, :, :], (b * k, n)).mT, (-1, b, k))
    factor = cholesky(gram / (size[:, :, None] * size[:, None, :]))
    if factor is None or float(xp.min(xp.linalg.diagonal(factor))) < STEEP:
        return _norms_by_qr(weight[:, :, None] * f.mT / size[:, None, :], d)
    return xp.sum(solve_triangular(factor, seen / size[:, :, None], lower=True) ** 2, axis=1)


def _norms_by_qr(spans: Array, d: Array) -> Array:
    """Return the same from the spanning columns (P, N, b) themselves: slower, and right where they nearly depend."""
    xp = namespace(spans)
    q, _ = xp.linalg.qr(spans)
    return xp.sum((xp.matrix_transpose(q) @ d) ** 2, axis=1)


def _certain(found: Ritz, d: Array, size: Array, power: float, blur: float) -> Array:
    """Return lower bounds (k,): a Ritz vector is an eigenvector, and |d| a share, up to residual over gap."""
    xp = namespace(d)
    theta, rho = found.theta, found.rho + blur
    apart = xp.abs(theta[:, None] - theta[None, :]) - rho[None, :]
    same = xp.eye(theta.shape[0], dtype=theta.dtype, device=theta.device) > 0
    gap = xp.min(xp.where(same, xp.inf, apart), axis=1)
    angle = xp.where(gap > rho, rho / xp.where(gap > 0, gap, 1.0), 1.0)
    share = xp.abs(d) * xp.sqrt(xp.clip(1 - angle**2, 0.0, None))[:, None] - angle[:, None] * size
    return xp.max(xp.clip(share, 0.0, None) / (theta ** (power / 2))[:, None], axis=0)
