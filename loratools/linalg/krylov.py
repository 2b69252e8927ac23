"""Block Lanczos with full reorthogonalisation, and the leading singular triples of anything that multiplies.

Blocks are 16 columns wide: BLAS reads a large matrix once for all of them, and is slow for odd widths below that.
Source: Golub, Underwood, "The block Lanczos method for computing eigenvalues", 1977.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from loratools.errors import NumericsError, UsageError
from loratools.leaf import Array
from loratools.linalg.namespace import all_finite, down, dtype_name, namespace, up, working_dtype
from loratools.linalg.orth import orthonormalise, orthonormalise_against
from loratools.linalg.rsvd import Operator, operator
from loratools.linalg.seeds import Key, signs

WIDTH = 16
"""Columns of a block (a multiple of it where more start vectors are given)."""

CHECK_EVERY = 4
"""Block steps between two looks at the Ritz values."""

ANGLE = 1e-3
"""How well directions are found by default: the angle to the true ones, in radians."""

DENSE_SIDE = 1024
"""Up to this many rows (or columns) a dense decomposition is cheap enough to settle what has not converged."""

Product = Callable[[Array], Array]


@dataclass(frozen=True)
class Krylov:
    """A block Krylov space of a symmetric G: ``G basis = basis t + following coupling E_last^T``.

    ``basis (m, N)`` orthonormal, in the compute dtype; ``t (N, N) = basis^T G basis`` in fp64; ``following (m, b)`` is
    the next block, orthonormal to the basis; ``coupling (b, b)`` in fp64.
    """

    basis: Array
    t: Array
    following: Array
    coupling: Array

    @property
    def width(self) -> int:
        """Columns of a block, b."""
        return int(self.following.shape[1])

    @property
    def columns(self) -> int:
        """Columns of the basis, N."""
        return int(self.basis.shape[1])


class Ritz(NamedTuple):
    """Eigenpairs of ``t``: values ``theta (N,)`` ascending, ``z (N, N)``, residuals |G x - theta x| ``rho (N,)``."""

    theta: Array
    z: Array
    rho: Array


class Leading(NamedTuple):
    """Singular triples u (m, k), s (k,) descending in fp64, vh (k, n), and how well they are known.

    ``residual (k,)``: measured |A v - s u| + |A^T u - s v| over s. ``angle (k,)``: a bound in radians on the angle
    between u and the true vector, residual over gap; 1.6 where neighbours are too close to tell apart.
    """

    u: Array
    s: Array
    vh: Array
    residual: Array
    angle: Array


def begin(start: Array) -> Krylov:
    """Return the empty space whose first block will span ``start (m, b)``."""
    following = orthonormalise(start)
    empty = up(following[:0, :0], "float64")
    return Krylov(following[:, :0], empty, following, empty)


def extend(product: Product, space: Krylov, steps: int) -> Krylov:
    """Return the space after ``steps`` more blocks; ``product`` maps (m, b) -> G (m, b).

    Cost per step: one product with b columns and 8 m N b flops. All of ``t``'s new columns are computed, not only the
    band: rounding errors then stay in the relation's residual, about eps |G|.
    """
    for _ in range(steps):
        space = _step(product, space)
    return space


def _step(product: Product, space: Krylov) -> Krylov:
    xp = namespace(space.basis)
    basis = xp.concat([space.basis, space.following], axis=1)
    y = product(space.following)
    h = basis.mT @ y
    y = y - basis @ h
    again = basis.mT @ y
    y = y - basis @ again
    column = up(h, "float64") + up(again, "float64")
    following = orthonormalise_against(basis, y)  # y may have died out: an invariant space goes on at random
    coupling = up(following, "float64").mT @ up(y, "float64")
    return Krylov(basis, _bordered(space.t, column), following, coupling)


def _bordered(t: Array, column: Array) -> Array:
    """Return the symmetric matrix t (N, N) grown by ``column (N + b, b)``."""
    xp, old = namespace(t), t.shape[0]
    corner = (column[old:, :] + column[old:, :].mT) / 2
    return xp.concat([xp.concat([t, column[:old, :]], axis=1), xp.concat([column[:old, :].mT, corner], axis=1)])


def ritz(space: Krylov) -> Ritz:
    """Return the Ritz values of a space with their vectors' coordinates and residuals; cost O(N^3)."""
    xp = namespace(space.t)
    theta, z = xp.linalg.eigh(space.t)
    return Ritz(theta, z, xp.linalg.vector_norm(space.coupling @ z[-space.width :, :], axis=0))


def leading(op: Operator | Array, k: int, *, key: Key, angle: float = ANGLE, max_columns: int = 1024) -> Leading:
    """Return the k leading singular triples of op (m, n), iterated until each u is within ``angle`` of the true one.

    Works on the smaller Gram matrix, A A^T or A^T A. Cost: two products of 16 columns per block step (8 to 24 are
    usual), and two at the end, which measure the residual. At ``max_columns`` it stops with what it has; matrices of up
    to 1024 rows or columns that have not converged by then are decomposed densely. Raises UsageError unless
    1 <= k <= min(m, n), NumericsError for values that are not finite.
    """
    op = operator(op)
    m, n = op.shape[-2:]
    if not 1 <= k <= min(m, n):
        raise UsageError("no such singular vectors", expected=f"1 <= k <= {min(m, n)}", got=k)
    if m > n:
        v, s, uh, residual, bound = leading(Transposed(op), k, key=key, angle=angle, max_columns=max_columns)
        return Leading(uh.mT, s, v.mT, residual, _clipped(bound * (s[0] / namespace(s).where(s > 0, s, s[0] or 1.0))))
    width = WIDTH * (1 + (k + 1) // WIDTH)
    if m < 4 * width:
        return _dense(op, k)
    found = _iterated(op, k, width, key, angle, min(max_columns, m - width))
    return _dense(op, k) if m <= DENSE_SIDE and float(namespace(found.angle).max(found.angle)) > angle else found


class Transposed:
    """The transpose of an operator."""

    def __init__(self, op: Operator) -> None:
        self.shape = (op.shape[-1], op.shape[-2])
        self.matmul, self.rmatmul = op.rmatmul, op.matmul
        self.like = getattr(op, "like", None)


def _iterated(op: Operator, k: int, width: int, key: Key, angle: float, max_columns: int) -> Leading:
    space = begin(_start(op, width, key))
    while True:
        steps = min(CHECK_EVERY, (max_columns - space.columns) // width)
        space = extend(lambda x: op.matmul(op.rmatmul(x)), space, steps)
        if not all_finite(space.coupling):
            raise NumericsError("the matrix is not finite, or its squares overflow")
        theta, z, rho = ritz(space)
        known = _angles(theta, rho, k)
        if float(namespace(known).max(known)) <= angle / 2 or space.columns + width > max_columns:
            return _triples(op, space, theta, z, rho, k)


def _start(op: Operator, width: int, key: Key) -> Array:
    """Return random signs (m, width) in the compute dtype of the operator."""
    like = getattr(op, "like", None)
    w = signs(key, op.shape[-2], width, like=like)
    return w if like is None else up(w, working_dtype(like))


def _angles(theta: Array, rho: Array, k: int) -> Array:
    """Return residual over gap of the k largest Ritz pairs, largest first, at most 1.6; ``rho`` ascends like theta."""
    xp = namespace(theta)
    top = xp.flip(theta)[:k]
    apart = xp.abs(top[:, None] - xp.flip(theta)[None, :])
    itself = xp.arange(theta.shape[0], device=theta.device)[None, :] == xp.arange(k, device=theta.device)[:, None]
    gap = xp.min(xp.where(itself, xp.inf, apart), axis=1)
    return _clipped(xp.flip(rho)[:k] / xp.maximum(gap, xp.finfo(theta.dtype).smallest_normal + 1e-12 * top[0]))


def _clipped(angle: Array) -> Array:
    return namespace(angle).clip(angle, 0.0, 1.6)


def _triples(op: Operator, space: Krylov, theta: Array, z: Array, rho: Array, k: int) -> Leading:
    """Return the triples of the k largest Ritz pairs with measured residuals."""
    xp = namespace(theta)
    coordinates = xp.flip(z, axis=1)[:, : max(k, min(WIDTH, space.columns))]
    u = orthonormalise(space.basis @ down(coordinates, dtype_name(space.basis)))
    seen = op.rmatmul(u)
    s = xp.linalg.vector_norm(up(seen, "float64"), axis=0)
    v = seen / down(xp.where(s > 0, s, 1.0), dtype_name(seen))
    wrong = xp.linalg.vector_norm(up(op.matmul(v), "float64") - s * up(u, "float64"), axis=0)
    s, wrong = s[:k], wrong[:k]
    angle = _angles(theta, xp.concat([rho[:-k], xp.flip(xp.maximum(xp.flip(rho)[:k], s * wrong))]), k)
    return Leading(u[:, :k], s, v.mT[:k, :], wrong / xp.where(s > 0, s, 1.0), angle)


def _dense(op: Operator, k: int) -> Leading:
    """Return the triples by a dense SVD in fp64 of the formed operator."""
    like = _start(op, 1, (0, 0))
    xp = namespace(like)
    matrix = op.matmul(xp.eye(op.shape[-1], dtype=like.dtype, device=like.device))
    if not all_finite(matrix):
        raise NumericsError("the matrix is not finite")
    u, s, vh = xp.linalg.svd(up(matrix, "float64"), full_matrices=False)
    dtype, zero = working_dtype(matrix), xp.zeros_like(s[:k])
    return Leading(down(u[:, :k], dtype), s[:k], down(vh[:k, :], dtype), zero, zero)
