"""Weighted sums of updates: exact, in factor space where every part has factors; and the update that is zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import ClassVar, Self

from loratools.core import generic
from loratools.core.update import Array, Delta, Leaf, Update, namespace, tensors, working_dtype
from loratools.fusion.sparse_union import all_sparse, sparse_union
from loratools.kinds.lowrank import LowRank, concatenate, low_rank
from loratools.linalg.namespace import up


@dataclass(frozen=True)
class Zero(Delta):
    """D = 0: what a module contributes to an adapter that lacks it. ``like``: a tensor of its library and device."""

    kind: ClassVar[str] = "zero"
    shape: tuple[int, ...]
    like: Leaf | Array | None = None

    def _zeros(self, rows: int, columns: int) -> Array:
        like = None if isinstance(self.like, Leaf) else self.like
        xp = namespace(like)
        return xp.zeros((rows, columns), dtype=xp.float32, device=getattr(like, "device", None))

    def matmul(self, x: Array) -> Array:
        """Return zeros (rows, k)."""
        return self._zeros(self.matrix_shape[0], x.shape[1])

    def rmatmul(self, y: Array) -> Array:
        """Return zeros (columns, k)."""
        return self._zeros(self.matrix_shape[1], y.shape[1])

    def dense(self) -> Array:
        """Return zeros of ``shape``."""
        return self._zeros(*self.matrix_shape).reshape(self.shape)

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 7 zero."""
        return cls((5, 7))


@low_rank.register
def _(u: Zero) -> LowRank:
    m, n = u.matrix_shape
    return LowRank(u._zeros(m, 1), u._zeros(1, n), 1.0, u.shape)


@generic.inner.register
def _(u: Zero, v: Delta) -> float:
    return 0.0


@dataclass(frozen=True)
class Combination(Delta):
    """D = sum of c_i D_i, for parts of which at least one has no factors (a DoRA's true update, a dense difference)."""

    kind: ClassVar[str] = "combination"
    parts: tuple[Delta, ...]
    coefficients: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return self.parts[0].shape

    def matmul(self, x: Array) -> Array:
        """Return the sum of the parts' products."""
        return reduce(add, (c * p.matmul(x) for c, p in zip(self.coefficients, self.parts, strict=True)))

    def rmatmul(self, y: Array) -> Array:
        """Return the sum of the parts' transposed products."""
        return reduce(add, (c * p.rmatmul(y) for c, p in zip(self.coefficients, self.parts, strict=True)))

    def dense(self) -> Array:
        """Return the sum of the parts, formed."""
        return reduce(add, (c * p.dense() for c, p in zip(self.coefficients, self.parts, strict=True)))

    @classmethod
    def example(cls, seed: int) -> Self:
        """Twice one low-rank update minus another."""
        return cls((LowRank.example(seed), LowRank.example(seed + 1)), (2.0, -1.0))


@generic.inner.register
def _(u: Combination, v: Delta) -> float:
    return float(sum(c * generic.inner(p, v) for c, p in zip(u.coefficients, u.parts, strict=True)))


def combine(deltas: Sequence[Delta], coefficients: Sequence[float]) -> Delta:
    """Return sum c_i D_i exactly: factors side by side (rank: the sum of ranks), entries, or a :class:`Combination`.

    Parts that are zero or have coefficient 0 are left out. Cost: reading and copying the factors.
    """
    kept = [(c, d) for c, d in zip(coefficients, deltas, strict=True) if c != 0 and not isinstance(d, Zero)]
    if not kept:
        return zero_of(deltas)
    low = [low_rank(d) for _, d in kept]
    known = [replace(u, scale=c * u.scale) for (c, _), u in zip(kept, low, strict=True) if u is not None]
    parts = [d for _, d in kept]
    if all_sparse(parts):
        return sparse_union(parts, [c for c, _ in kept], elect=False, working=True)
    if len(known) < len(kept):
        return Combination(tuple(d for _, d in kept), tuple(c for c, _ in kept))
    return known[0] if len(known) == 1 else concatenate(tuple(known))


def zero_of(deltas: Sequence[Delta]) -> Zero:
    """Return the zero of the shape, library and device of the given updates."""
    return Zero(deltas[0].shape, like_of(deltas))


def like_of(deltas: Sequence[Update]) -> Array | None:
    """Return any array in memory of the updates, for its library and device; None where all are in files."""
    return next((t for d in deltas for _, t in tensors(d) if not isinstance(t, Leaf)), None)


def dtype_of(deltas: Sequence[Delta]) -> str:
    """Return the dtype to compute in: fp64 if a tensor of the updates is."""
    return working_dtype(*(t for d in deltas for _, t in tensors(d)))


def factors_of(d: Delta) -> tuple[Array, Array]:
    """Return b (m, r), a (r, n) with b a = D exactly: its factors, or D itself beside the identity of its columns."""
    low = low_rank(d)
    if low is not None:
        b, a = low.factors()
        return (b if low.scale == 1 else low.scale * b), a
    x = up(d.matrix(), dtype_of([d]))
    return x, namespace(x).eye(x.shape[1], dtype=x.dtype, device=x.device)
