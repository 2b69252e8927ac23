"""Truncation that is best where it matters: |P^1/2 (D - D') Q^1/2|_F, P weighing outputs and Q inputs.

A weight is symmetric and positive semidefinite: a vector stands for a diagonal, a matrix for itself, None for the
identity. With P^1/2 D Q^1/2 = U S V^T the optimum is

    D' = D Q^1/2 V_k S_k^-1 U_k^T P^1/2 D,

since P^1/2 D' Q^1/2 = U_k S_k V_k^T. Nothing but the kept singular values is inverted, so singular weights need no
mending: D' stays between the columns and the rows of D, also where nothing is weighed. In factors it is b times
something small times a, out of b^T P b and a Q a^T alone (weights enter only there), and does not depend on their
gauge. For invertible weights it is the one optimum, P^-1/2 (U_k S_k V_k^T) Q^-1/2.

Source: Eckart, Young 1936 for the weighted matrix; diagonal weights as in FWSVD (arXiv:2207.00112), Gram matrices of
inputs as in SVD-LLM (arXiv:2403.07378), which inverts their Cholesky factors instead.
"""

from __future__ import annotations

from math import isnan, sqrt
from typing import NamedTuple

from loratools.errors import NumericsError, UsageError
from loratools.leaf import Array, Leaf
from loratools.linalg.cores import balanced, of_grams, trusted
from loratools.linalg.factored import Choose, Truncation, capped, checked_factors, frobenius, truncate_qr
from loratools.linalg.gram import FP64, cross
from loratools.linalg.namespace import all_finite, cholesky, down, dtype_name, namespace, up
from loratools.linalg.select import energy_kept, tail_error

ROWS = 1024
"""Rows of a weight matrix that are widened to fp64 at a time."""

STRICT = 1e-9
"""Largest noise of Gram matrices relative to the smallest kept s^2; QR beyond. Errors of the optimum are its square."""

ROUNDING = 1e-5
"""What fp32 sums may leave of asymmetry or of negative eigenvalues, relative to the largest one; it stays far below."""

DEAD = 1e-10
"""Directions below this share of the first are not seen by the weights."""


class Weights(NamedTuple):
    """``left`` P (m,) or (m, m) and ``right`` Q (n,) or (n, n); None is the identity."""

    left: Array | None = None
    right: Array | None = None

    def checked(self, m: int, n: int) -> Weights:
        """Return the weights, or raise: UsageError for a wrong shape, NumericsError for NaN, inf and negative ones."""
        return Weights(_checked(self.left, m, "outputs"), _checked(self.right, n, "inputs"))


class Cores(NamedTuple):
    """A truncation as it acts on the factors: D' = (b @ left) (right @ a), left (R, k), right (k, R), fp64.

    ``s`` are the singular values of P^1/2 D Q^1/2; ``left`` and ``right`` are balanced in the weighted norm, columns in
    descending order, so that the first j of them are the optimum of rank j. Directions that the weights do not see are
    left out: there may be fewer columns than ``k``.
    """

    left: Array
    right: Array
    s: Array
    k: int
    route: str


def truncate(b: Leaf | Array, a: Leaf | Array, choose: Choose, *, weights: Weights, scale: float = 1.0) -> Truncation:
    """Cut ``D = scale * b @ a`` to the rank ``choose(singular values)`` that is best in the weighted norm.

    b (m, R), a (R, n) -> factors in fp32 (fp64 if one input is), balanced in the weighted norm; spectrum, energy and
    error are those of P^1/2 D Q^1/2. Ranks beyond what the weights see go to the best plain approximation of the rest,
    where that costs nothing weighted; else they are zero columns and unit rows. P = Q = None is the plain optimum.

    Cost 2 (m + n) R^2 flops in fp64, and 2 R n^2 for a matrix Q. Guarantee: weighted error at most 1e-10 |D|_w above
    the optimum, in fp64. Raises as :func:`loratools.linalg.factored.truncate` and :meth:`Weights.checked`.
    """
    b, a = checked_factors(b, a, scale)
    found = cores(b, a, choose, weights=weights, scale=scale)
    b64, a64, dtype = up(b, "float64"), up(a, "float64"), dtype_name(b)
    tall, wide = b64 @ found.left, found.right @ a64
    missing = found.k - int(found.left.shape[1])
    if missing:
        tall, wide = _filled(b64, a64, found, weights, scale)
    kept = (energy_kept(found.s, found.k), tail_error(found.s, found.k))
    return Truncation(down(tall, dtype), down(wide, dtype), found.s, found.k, *kept, found.route)


def cores(b: Array, a: Array, choose: Choose, *, weights: Weights, scale: float = 1.0) -> Cores:
    """Return the small matrices of :func:`truncate`: Gram matrices where they are accurate enough, QR otherwise."""
    m, n = b.shape[0], a.shape[1]
    weights, choose = weights.checked(m, n), capped(choose)
    if not (all_finite(b) and all_finite(a)):
        raise NumericsError("a factor is not finite")
    gb, ga = gram(b, weights.left), gram(a.mT, weights.right)
    noise = FP64.noise * _cancelled(b, a, gb, ga, weights)
    found = of_grams(gb[None, :, :], ga[None, :, :], min(*b.shape, *a.shape), noise, [scale])
    if (size := float(found.noise[0])) > 0:
        s = found.s[0, :]
        k = choose(s)
        if trusted(found.s, found.noise, [k], [choose]) == [True] and size <= STRICT * float(s[k - 1]) ** 2:
            return Cores(*balanced(found, 0, k), s, k, "gram64")
    return _cores_qr(b, a, choose, weights, scale)


def singular_values(b: Array, a: Array, weights: Weights, *, scale: float = 1.0) -> Array:
    """Return all min(R, m, n) singular values of ``P^1/2 (scale b a) Q^1/2`` in fp64, right to about 1e-7 s_1."""
    weights = weights.checked(b.shape[0], a.shape[1])
    count = min(*b.shape, *a.shape)
    gb, ga = gram(b, weights.left), gram(a.mT, weights.right)
    found = of_grams(gb[None, :, :], ga[None, :, :], count, FP64.noise, [scale])
    return _cores_qr(b, a, lambda s: count, weights, scale).s if isnan(float(found.noise[0])) else found.s[0, :]


def norm(b: Array, a: Array, weights: Weights, *, scale: float = 1.0) -> float:
    """Return ``|P^1/2 (scale b a) Q^1/2|_F``: right to 1e-6 for diagonals; to 1e-8 of |b| |a| for matrices."""
    diagonal = all(w is None or w.ndim == 1 for w in weights)
    if diagonal:
        return frobenius(root_applied(weights.left, b), root_applied(weights.right, a.mT).mT, scale=scale)
    xp = namespace(b, a)
    return abs(scale) * sqrt(max(float(xp.sum(gram(b, weights.left) * gram(a.mT, weights.right))), 0.0))


def gram(x: Array, weight: Array | None) -> Array:
    """Return ``x^T W x`` in fp64: x (n, R), W (n,), (n, n) or None -> (R, R)."""
    if weight is None or weight.ndim == 1:
        x = root_applied(weight, x)
        return cross(x, x, "float64")
    xp, x = namespace(x), up(x, "float64")
    rows = [up(weight[i : i + ROWS, :], "float64") @ x for i in range(0, x.shape[0], ROWS)]
    product = x.mT @ xp.concat(rows, axis=0)
    both = (product + product.mT) / 2
    mu = xp.linalg.eigvalsh(both)
    if float(xp.max(xp.abs(product - both))) > ROUNDING * float(xp.max(xp.abs(mu))):
        raise NumericsError("a weight matrix is not symmetric")
    _check_semidefinite(mu)
    return both


def root_applied(weight: Array | None, x: Array) -> Array:
    """Return ``F^T x`` in fp64 for some F with F F^T = W: x (n, R) -> (n, R)."""
    if weight is None:
        return up(x, "float64")
    if weight.ndim == 1:
        return namespace(x).sqrt(up(weight, "float64"))[:, None] * up(x, "float64")
    return _root(up(weight, "float64")).mT @ up(x, "float64")


def _root(weight: Array) -> Array:
    """Return F with F F^T = W: its Cholesky factor, or where it is singular its eigenvectors times their roots."""
    factor = cholesky(weight)
    if factor is not None:
        return factor
    xp = namespace(weight)
    mu, x = xp.linalg.eigh((weight + weight.mT) / 2)
    _check_semidefinite(mu)
    return x * xp.sqrt(xp.clip(mu, 0.0, None))


def _check_semidefinite(mu: Array) -> None:
    if float(mu[0]) < -ROUNDING * float(mu[-1]):
        raise NumericsError("a weight matrix is not positive semidefinite", got=f"an eigenvalue of {float(mu[0]):.3g}")


def _checked(weight: Array | None, size: int, what: str) -> Array | None:
    if weight is None:
        return None
    shape = tuple(weight.shape)
    if shape not in ((size,), (size, size)):
        raise UsageError(
            f"a weight of the {what} has the wrong shape", expected=f"({size},) or {(size, size)}", got=shape
        )
    xp = namespace(weight)
    diagonal = weight if weight.ndim == 1 else xp.linalg.diagonal(weight)
    if not all_finite(weight) or bool(xp.any(diagonal < 0)):
        raise NumericsError(f"a weight of the {what} is negative or not finite", expected="finite and not negative")
    if not bool(xp.any(diagonal > 0)):
        raise NumericsError(
            f"the weights of the {what} are all zero", hint="collect statistics on inputs that reach it"
        )
    return weight


def _cancelled(b: Array, a: Array, gb: Array, ga: Array, weights: Weights) -> float:
    """Return how much larger the terms of the Gram products may be than their sums: 1 for diagonals, which only add."""
    xp, worst = namespace(b, a), 1.0
    for x, g, weight in ((b, gb, weights.left), (a, ga, weights.right)):
        size = float(xp.linalg.matrix_norm(g))
        if weight is not None and weight.ndim == 2 and size > 0:
            terms = float(xp.sum(up(x, "float64") ** 2)) * float(xp.linalg.matrix_norm(up(weight)))
            worst *= max(1.0, terms / size)
    return worst


def _cores_qr(b: Array, a: Array, choose: Choose, weights: Weights, scale: float) -> Cores:
    """Return the cores by QR of both weighted factors and SVD of their product, R x R; the reference."""
    xp = namespace(b, a)
    rb = xp.linalg.qr(root_applied(weights.left, b))[1]
    ra = xp.linalg.qr(root_applied(weights.right, a.mT))[1]
    u, s, vh = xp.linalg.svd(rb @ ra.mT, full_matrices=False)
    k = choose(abs(scale) * s)
    seen = min(k, int(xp.sum(s > DEAD * s[0])))
    root = xp.sqrt(s[:seen])
    size, sign = abs(scale) ** 0.5, -1.0 if scale < 0 else 1.0
    left = (ra.mT @ vh[:seen, :].mT) / root * (sign * size)
    right = (u[:, :seen] / root).mT @ rb * size
    return Cores(left, right, abs(scale) * s, k, "qr")


def _filled(b: Array, a: Array, found: Cores, weights: Weights, scale: float) -> tuple[Array, Array]:
    """Return factors with all k columns: the best plain ones of the rest if the weights do not see them, else zeros."""
    xp, missing = namespace(b, a), found.k - int(found.left.shape[1])
    rest_a = (scale * xp.eye(a.shape[0], dtype=a.dtype, device=a.device) - found.left @ found.right) @ a
    rest = truncate_qr(b, rest_a, lambda s: missing)
    tall, wide = rest.b, rest.a
    if norm(tall, wide, weights) > 1e-7 * float(xp.linalg.vector_norm(found.s)):
        tall = xp.zeros_like(tall)
    return xp.concat([b @ found.left, tall], axis=1), xp.concat([found.right @ a, wide], axis=0)
