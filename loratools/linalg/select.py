"""How many singular values to keep: by share of energy, by error, by numerical rank.

All take the spectrum ``s`` (R,), descending and non-negative, and return at least 1. Energy is squared Frobenius norm.
"""

from __future__ import annotations

from math import sqrt

from loratools.errors import UsageError
from loratools.leaf import Array
from loratools.linalg.namespace import namespace


def rank_for_energy(s: Array, energy: float) -> int:
    """Return the smallest k whose leading values hold the share ``energy``: cumsum(s^2)[k-1] >= energy * total.

    ``energy = 1`` gives the numerical rank: in floating point the last values vanish in the sum long before they are
    zero. Raises UsageError unless 0 < energy <= 1.
    """
    if not 0 < energy <= 1:
        raise UsageError("energy is a share", expected="0 < energy <= 1", got=energy)
    if energy == 1:
        return numerical_rank(s)
    xp = namespace(s)
    kept = xp.cumulative_sum(_squares(s))
    return 1 + int(xp.sum(kept < energy * kept[-1]))


def rank_for_error(s: Array, error: float) -> int:
    """Return the smallest k with a relative Frobenius error of at most ``error``: sum of s^2 beyond k <= error^2 total.

    ``error = 0`` gives the numerical rank. Raises UsageError unless 0 <= error < 1.
    """
    if not 0 <= error < 1:
        raise UsageError("error is relative to the norm", expected="0 <= error < 1", got=error)
    if error == 0:
        return numerical_rank(s)
    return max(1, int(namespace(s).sum(_tails(s) > error**2)))


def numerical_rank(s: Array, rtol: float = 1e-7) -> int:
    """Return how many values exceed ``rtol`` times the largest, at least 1."""
    xp = namespace(s)
    return max(1, int(xp.sum(s > rtol * s[0])))


def energy_kept(s: Array, k: int) -> float:
    """Return the share of the energy in the first ``k`` values; 1.0 for a zero spectrum."""
    return 1.0 - float(_tails(s)[k])


def tail_error(s: Array, k: int) -> float:
    """Return the relative Frobenius error of keeping ``k`` values; 0.0 for a zero spectrum."""
    return sqrt(float(_tails(s)[k]))


def _tails(s: Array) -> Array:
    """Return the (R + 1,) shares of the energy beyond k = 0 .. R, summed from the small end: tiny tails stay right."""
    xp = namespace(s)
    beyond = xp.flip(xp.cumulative_sum(xp.flip(_squares(s)), include_initial=True))
    return beyond / beyond[0] if float(beyond[0]) else beyond


def _squares(s: Array) -> Array:
    """Return ``(s / s_1)^2``: the quotient keeps the squares in range."""
    return (s / s[0]) ** 2 if float(s[0]) else s
