"""What the two Gram matrices of a product ``s * b @ a`` tell: its spectrum, and the health of its channels.

Channel i is column i of b with row i of a. Nothing here looks at the factors twice.
"""

from __future__ import annotations

from typing import NamedTuple

from loratools.leaf import Array
from loratools.linalg import factored
from loratools.linalg.gram import grams
from loratools.linalg.namespace import all_finite, cholesky, namespace

PARALLEL = 1e-6
"""1 - |cosine| below which two columns are one."""


class Channels(NamedTuple):
    """``s (min(R, m, n),)`` descending, ``gb = b^T b`` and ``ga = a a^T`` (R, R), all fp64; the scale is in s alone.

    Where a factor is not finite, ``s`` is empty.
    """

    s: Array
    gb: Array
    ga: Array
    scale: float


def channels(b: Array, a: Array, scale: float = 1.0) -> Channels:
    """Return Gram matrices and singular values of ``scale * b @ a``: b (m, R), a (R, n), fp32 or fp64.

    (m + n) R^2 multiply-adds in fp64; QR instead of the Gram matrices where values below 1e-6 s_1 are to be told apart.
    """
    gb, ga = grams(b, a, "float64")
    if not (all_finite(gb) and all_finite(ga)):
        return Channels(gb[0, :0], gb, ga, scale)
    return Channels(_values(b, a, gb, ga, scale), gb, ga, scale)


def _values(b: Array, a: Array, gb: Array, ga: Array, scale: float) -> Array:
    xp, count = namespace(gb), min(*b.shape, *a.shape)
    factor = cholesky(ga)
    if factor is not None:
        squares = xp.flip(xp.linalg.eigvalsh(factor.mT @ gb @ factor))[:count]
        # rounding of the products is about 1e-15 |gb| |ga|, far below (1e-6 s_1)^2 unless the product nearly cancels
        if float(squares[-1]) > max(1e-12 * float(squares[0]), 1e-13 * _size(gb) * _size(ga)):
            return abs(scale) * xp.sqrt(squares)
    return factored.singular_values(b, a, scale=scale)


def _size(g: Array) -> float:
    return float(namespace(g).linalg.matrix_norm(g))


def dead(found: Channels) -> int:
    """Return how many channels are zero: they do nothing."""
    xp = namespace(found.gb)
    return int(xp.sum(xp.linalg.diagonal(found.gb) * xp.linalg.diagonal(found.ga) == 0))


def duplicates(found: Channels) -> int:
    """Return how many channels repeat the direction of an earlier one, in both factors."""
    xp = namespace(found.gb)
    same = xp.tril((_cosines(found.gb) > 1 - PARALLEL) & (_cosines(found.ga) > 1 - PARALLEL), k=-1)
    return int(xp.sum(xp.any(same, axis=1)))


def _cosines(g: Array) -> Array:
    """Return |cosines| between the columns behind a Gram matrix; 0 for zero columns."""
    xp = namespace(g)
    size = xp.sqrt(xp.linalg.diagonal(g))
    safe = xp.where(size > 0, size, xp.inf)
    return xp.abs(g) / safe[:, None] / safe[None, :]


def balance(found: Channels) -> float | None:
    """Return |b| / |a|, Frobenius; None where one is zero."""
    xp = namespace(found.gb)
    b, a = (float(xp.sum(xp.linalg.diagonal(g))) for g in (found.gb, found.ga))
    return (b / a) ** 0.5 if a > 0 and b > 0 else None


def condition(g: Array) -> float | None:
    """Return the condition number of the factor behind a Gram matrix; None beyond 1e7, where it is singular to us."""
    xp = namespace(g)
    mu = xp.linalg.eigvalsh(g)
    low, high = float(mu[0]), float(mu[-1])
    return (high / low) ** 0.5 if low > 1e-14 * high > 0 else None


def prefix_errors(found: Channels) -> list[float]:
    """Return |D - D_r| / |D| of the leading r channels at the same scale, for r = 0 .. R; zeros for a zero update.

    D - D_r consists of the channels beyond r: its squared norm is the sum over that corner of gb * ga.
    """
    xp = namespace(found.gb)
    both = xp.flip(found.gb * found.ga)  # flips both axes: corners become leading blocks
    blocks = xp.linalg.diagonal(xp.cumulative_sum(xp.cumulative_sum(both, axis=0), axis=1))
    total = float(blocks[-1])
    tails = [0.0, *(max(float(x), 0.0) for x in blocks)]
    return [(x / total) ** 0.5 if total > 0 else 0.0 for x in reversed(tails)]
