"""Weights of a norm ``|P D Q|_F``: vectors stand for diagonals, matrices are triangular (Cholesky factors)."""

from __future__ import annotations

from loratools.errors import NumericsError, UsageError
from loratools.leaf import Array
from loratools.linalg.namespace import all_finite, namespace, solve_triangular, up


def apply(p: Array | None, x: Array) -> Array:
    """Return ``P x`` in fp64: p (m,) or (m, m) or None for the identity, x (m, r) -> (m, r)."""
    if p is None:
        return up(x, "float64")
    p = _checked(p, x.shape[0])
    return p[:, None] * x if p.ndim == 1 else p @ up(x, "float64")


def solve(p: Array | None, y: Array) -> Array:
    """Return ``P^-1 y`` in fp64: the inverse of :func:`apply`, by division or triangular substitution."""
    if p is None:
        return y
    p = _checked(p, y.shape[0])
    return y / p[:, None] if p.ndim == 1 else solve_triangular(p, y, lower=_is_lower(p))


def _checked(p: Array, m: int) -> Array:
    """Return the weight in fp64, or raise: UsageError for a wrong form, NumericsError for one that has no inverse."""
    xp = namespace(p)
    if p.shape not in ((m,), (m, m)):
        raise UsageError("a weight has the wrong shape", expected=f"({m},) or ({m}, {m})", got=tuple(p.shape))
    p = up(p, "float64")
    diagonal = p if p.ndim == 1 else xp.linalg.diagonal(p)
    if not all_finite(p) or not bool(xp.all(diagonal != 0)):
        raise NumericsError("a weight is not invertible", expected="finite, without zeros on the diagonal")
    return p


def _is_lower(p: Array) -> bool:
    """Tell the triangle of a triangular matrix; UsageError where both are occupied."""
    xp = namespace(p)
    lower = not bool(xp.any(xp.triu(p, k=1) != 0))
    if not lower and bool(xp.any(xp.tril(p, k=-1) != 0)):
        raise UsageError("a weight matrix is not triangular", hint="pass its Cholesky factor")
    return lower
