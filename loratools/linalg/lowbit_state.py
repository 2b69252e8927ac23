"""Where an encoding of low-bit factors stands: the problem, the values chosen so far, and what their error is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from loratools.leaf import Array
from loratools.linalg.levels import HALF
from loratools.linalg.namespace import namespace, up


class How(NamedTuple):
    """What stays the same throughout; ``precision`` is that of Gram products: small errors are differences of these."""

    bits: tuple[int, ...]
    group: int
    book: int
    precision: str

    def gram(self, x: Array, y: Array) -> Array:
        """Return x y^T (k, k) in fp64."""
        return up(up(x, self.precision) @ up(y, self.precision).mT, "float64")

    @property
    def half(self) -> int:
        """How many components are stored as plain values."""
        return sum(1 for one in self.bits if one == HALF)


class Problem(NamedTuple):
    """D = b^T a with b (k, m), a (k, n) and squared weights on the columns; ``square`` is the weighted |D|^2."""

    b: Array
    a: Array
    weights: Array | None
    square: float

    @classmethod
    def of(cls, b: Array, a: Array, weights: Array | None, how: How) -> Problem:
        """Return the problem of components b (m, k), a (k, n)."""
        xp = namespace(b)
        tall = xp.asarray(b.mT, copy=True)
        weighted = None if weights is None else up(weights) ** 2
        found = cls(tall, a, weighted, 0.0)
        return found._replace(square=float(xp.sum(how.gram(tall, tall) * how.gram(found.weigh(a), a))))

    def weigh(self, x: Array) -> Array:
        """Return x (k, n) with squared weights on its columns."""
        return x if self.weights is None else x * self.weights


class State(NamedTuple):
    """Values of both sides (k, m), (k, n), their scales (k, groups), Gram matrices and relative squared error.

    ``bb`` = b' b'^T, ``bd`` = b' b^T, and likewise for a: with them an error or a refit costs O(k^2).
    """

    b: Array
    a: Array
    left: Array
    right: Array
    bb: Array
    bd: Array
    aa: Array
    ad: Array
    error: float


def assessed(problem: Problem, b: Array, a: Array, left: Array, right: Array, grams: tuple[Array, ...]) -> State:
    """Return the state of these values, whose error follows from their Gram matrices."""
    bb, bd, aa, ad = grams
    xp = namespace(bb)
    wrong = problem.square - 2 * float(xp.sum(bd * ad)) + float(xp.sum(bb * aa))
    error = max(wrong / problem.square, 0.0) if problem.square else 0.0
    return State(b, a, left, right, bb, bd, aa, ad, error)


def gram_matrices(problem: Problem, b: Array, a: Array, how: How) -> tuple[Array, ...]:
    """Return b' b'^T, b' b^T, and the same of a, weighted: O((m + n) k^2)."""
    seen = problem.weigh(a)
    return how.gram(b, b), how.gram(b, problem.b), how.gram(seen, a), how.gram(seen, problem.a)


def runs(bits: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (bits, first, last + 1) of every stretch of components with equal bits."""
    out, start = [], 0
    for one, members in groupby(bits):
        stop = start + len(list(members))
        out.append((one, start, stop))
        start = stop
    return out
