"""The largest cosine between a vector and *all* left singular vectors of a matrix, bounded without finding them.

A singular vector of a tuned matrix is an *intruder* if that cosine is small: it resembles no direction of the base.
Source of the notion: Shuttleworth et al., "LoRA vs full fine-tuning: an illusion of equivalence", arXiv:2410.21228.

For W (m, n) with m <= n the left singular vectors are the eigenvectors of W W^T. For a tall W the min(m, n) thin ones
are x_i = W v_i / s_i, so u^T x_i = (W^T u)^T v_i / s_i: bounds on the eigenvectors v_i of W^T W answer, and what of u
lies outside the range of W drops out by itself. Where the small singular values are too many for that, a Cholesky
factor W^T W = L L^T reduces the tall case to the square one: u^T x_i = (L^-1 W^T u)^T w_i, w_i the left singular
vectors of L^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal

from loratools.errors import NumericsError
from loratools.leaf import Array
from loratools.linalg.christoffel import shares
from loratools.linalg.gram import cross
from loratools.linalg.krylov import WIDTH, Krylov, Product, begin, extend
from loratools.linalg.namespace import all_finite, cholesky, down, dtype_name, namespace, solve_triangular, up
from loratools.linalg.seeds import Key, signs

CHECKS = (6, 8, 10, 12, 16, 20, 24, 32, 40)
"""Block steps after which the bounds are looked at."""

DENSE_SIDE = 512
"""Up to this many rows (or columns) a dense eigendecomposition is cheaper than any iteration."""

Method = Literal["krylov", "triangular", "dense"]


@dataclass(frozen=True)
class Cosines:
    """What is known of max over x of |cos(u_j, x)|, for k vectors u_j; arrays (k,) in fp64.

    ``upper`` and ``lower`` bound it; ``slack`` is what the measured errors of the computation may add to either.
    ``method``: krylov, triangular (tall and ill-conditioned: after a Cholesky factorisation) or dense (a full
    eigendecomposition); ``steps``: block steps of the last Krylov space, 0 for dense.
    """

    upper: Array
    lower: Array
    slack: Array
    method: Method
    steps: int

    def intruders(self, eps: float) -> Array:
        """Return (k,) bools: is the largest cosine below ``eps``? The nearer bound answers where it is uncertain."""
        middle = (self.upper + self.lower) / 2
        return namespace(middle).where(self.certain(eps), self.upper < eps, middle < eps)

    def certain(self, eps: float) -> Array:
        """Return (k,) bools: do the bounds, errors included, leave no doubt?"""
        return (self.upper + self.slack < eps) | (self.lower - self.slack >= eps)


@dataclass(frozen=True)
class _Problem:
    """Eigenvectors of a symmetric G = product, and vectors h (d, k) whose shares in them are the cosines."""

    product: Product
    start: Array
    h: Array
    divided: bool
    method: Method


def max_cosines(
    w: Array, u: Array, *, eps: float, key: Key, angle: Array | float = 0.0, dense: bool = False
) -> Cosines:
    """Bound the largest |cos| of each u_j with all thin left singular vectors of w, until all are decided at ``eps``.

    w (m, n), u (m, k) orthonormal, fp32 or fp64. ``angle``: how far u_j may be from the vector that is meant, in
    radians; it enters the slack. Products in the dtype of w, everything small in fp64. Typically 6 to 16 block steps of
    two products with 16 columns; then up to 40; then (also with ``dense``) an eigendecomposition of the smaller Gram
    matrix in fp64, 9 min(m, n)^3 flops and 32 min(m, n)^2 bytes. ``upper`` is at least, ``lower`` at most the truth at
    every step, up to ``slack``. Raises NumericsError where w is not finite.
    """
    side = min(w.shape)
    if dense or side <= max(DENSE_SIDE, 2 * u.shape[1]):
        return dense_cosines(w, u, angle=angle)
    found = _iterated(_tall(w, u, key) if w.shape[0] > w.shape[1] else _wide(w, u, key), side, eps, angle)
    if w.shape[0] > w.shape[1] and not _settled(found, eps):
        problem = _triangular(w, u, key)
        found = found if problem is None else _iterated(problem, side, eps, angle)
    return found if _settled(found, eps) else dense_cosines(w, u, angle=angle)


def dense_cosines(w: Array, u: Array, *, angle: Array | float = 0.0) -> Cosines:
    """Return the largest cosines exactly, from an eigendecomposition of the smaller Gram matrix in fp64.

    Singular values below max(m, n) eps s_1 have no singular vectors of their own: for a tall w they are left out,
    otherwise their space counts as one direction.
    """
    xp, (m, n) = namespace(w, u), w.shape
    tall = m > n
    mu, x = xp.linalg.eigh(cross(w, w, "float64") if tall else cross(w.mT, w.mT, "float64"))
    if not all_finite(mu):
        raise NumericsError("the base weights are not finite")
    floor = max(m, n) * xp.finfo(mu.dtype).eps * float(mu[-1])
    share = xp.abs(x.mT @ (cross(w, u, "float64") if tall else up(u, "float64")))
    alive = (mu > floor)[:, None]
    scaled = share / xp.sqrt(xp.where(alive, mu[:, None], 1.0)) if tall else share
    lost = xp.linalg.vector_norm(xp.where(alive, 0.0, share), axis=0)
    best = xp.max(xp.where(alive, scaled, 0.0), axis=0)
    best = best if tall else xp.maximum(best, lost)
    return Cosines(best, best, xp.zeros_like(best) + angle, "dense", 0)


def _wide(w: Array, u: Array, key: Key) -> _Problem:
    return _Problem(lambda x: w @ (w.mT @ x), _padded(u, key), u, False, "krylov")


def _tall(w: Array, u: Array, key: Key) -> _Problem:
    h = w.mT @ _padded(u, key)
    return _Problem(lambda x: w.mT @ (w @ x), _padded(h[:, : u.shape[1]], key), h[:, : u.shape[1]], True, "krylov")


def _triangular(w: Array, u: Array, key: Key) -> _Problem | None:
    """Return the square problem of the Cholesky factor, or None where w has not full rank; 2 m n^2 flops in fp64."""
    factor = cholesky(cross(w, w, "float64"))
    if factor is None:
        return None
    h = solve_triangular(factor, cross(w, u, "float64"), lower=True)
    upper = down(factor.mT, dtype_name(w))
    return _Problem(lambda x: upper @ (upper.mT @ x), _padded(down(h, dtype_name(w)), key), h, False, "triangular")


def _padded(u: Array, key: Key) -> Array:
    """Return the columns of u (d, k), scaled to length 1, and random ones up to a multiple of 16."""
    xp, (d, k) = namespace(u), u.shape
    size = xp.linalg.vector_norm(u, axis=0)
    random = signs(key, d, WIDTH * (1 + (k - 1) // WIDTH) - k, like=u)
    return xp.concat([u / xp.where(size > 0, size, 1.0), down(random, dtype_name(u))], axis=1)


def _iterated(problem: _Problem, side: int, eps: float, angle: Array | float) -> Cosines:
    """Take block steps until every vector is decided, or the space nearly fills everything."""
    space = begin(problem.start)
    error, found = 0.0, None
    for steps in CHECKS:
        if found is not None and (_settled(found, eps) or (steps + 1) * space.width > 3 * side // 4):
            break
        space = extend(problem.product, space, steps - space.columns // space.width)
        if not all_finite(space.t):
            raise NumericsError("the base weights are not finite, or their squares overflow")
        error = error or _relation_error(problem.product, space)
        found = _judged(problem, space, error, angle)
    assert found is not None
    return found


def _judged(problem: _Problem, space: Krylov, error: float, angle: Array | float) -> Cosines:
    xp = namespace(space.t)
    c = up(space.basis, "float64").mT @ up(problem.h, "float64")
    bound = shares(space, c, divided=problem.divided, blur=2 * error)  # |E| is below twice its columns' norm
    steps = space.columns // space.width
    return Cosines(xp.clip(bound.upper, 0.0, 1.0), bound.lower, bound.slack + angle, problem.method, steps)


def _relation_error(product: Product, space: Krylov) -> float:
    """Measure the rounding in the Krylov relation: the root mean square norm of the columns of its residual E.

    |E w| for random signs w, all at the cost of one product.
    """
    xp = namespace(space.basis)
    w = up(signs((0, 0), space.columns, space.width, like=space.basis), "float64") / space.columns**0.5
    seen = up(product(space.basis @ down(w, dtype_name(space.basis))), "float64")
    said = up(space.basis, "float64") @ (space.t @ w)
    said = said + up(space.following, "float64") @ (space.coupling @ w[-space.width :, :])
    return float(xp.linalg.matrix_norm(seen - said)) / sqrt(space.width)


def _settled(found: Cosines, eps: float) -> bool:
    return bool(namespace(found.upper).all(found.certain(eps)))
