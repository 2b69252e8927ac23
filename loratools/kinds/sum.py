"""Sum: several updates of one parameter, added."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Self

from loratools.core import generic
from loratools.core.generic import need_delta
from loratools.core.routes import route
from loratools.core.rows import Rows, rowwise
from loratools.core.update import Array, Delta, Update, kind
from loratools.errors import FormatError
from loratools.kinds.dense import Dense
from loratools.kinds.hadamard import thin
from loratools.kinds.lowrank import LowRank, concatenate, low_rank


@kind("sum")
class Sum(Delta):
    """D = D_1 + ... + D_k, of equal shapes, at least one."""

    parts: tuple[Delta, ...]

    def __post_init__(self) -> None:
        if not self.parts or any(p.shape != self.parts[0].shape for p in self.parts):
            raise FormatError(
                "the parts of a sum differ", expected="one shape", got=", ".join(str(p.shape) for p in self.parts)
            )

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return self.parts[0].shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The parts' own: stacks of experts are block diagonal."""
        return self.parts[0].matrix_shape

    def matrix(self) -> Array:
        """Return the sum of the parts' matrix views, formed."""
        return reduce(add, (p.matrix() for p in self.parts))

    def matmul(self, x: Array) -> Array:
        """Return the sum of the parts' products."""
        return reduce(add, (p.matmul(x) for p in self.parts))

    def rmatmul(self, y: Array) -> Array:
        """Return the sum of the parts' transposed products."""
        return reduce(add, (p.rmatmul(y) for p in self.parts))

    def dense(self) -> Array:
        """Return the sum of the parts, formed."""
        return reduce(add, (p.dense() for p in self.parts))

    @classmethod
    def example(cls, seed: int) -> Self:
        """Two low-rank updates."""
        return cls((LowRank.example(seed), LowRank.example(seed + 1)))


@low_rank.register(Sum)
def _(u: Sum) -> LowRank | None:
    parts = tuple(low_rank(p) for p in u.parts)
    known = tuple(p for p in parts if p is not None)
    return concatenate(known) if len(known) == len(parts) else None


@generic.transposed.register(Sum)
def _(u: Sum) -> Sum:
    return Sum(tuple(need_delta(generic.transposed(p)) for p in u.parts))


@generic.inner.register(Sum)
def _(u: Sum, v: Delta) -> float:
    return sum(generic.inner(p, v) for p in u.parts)


@generic.svdvals.register(Sum)
def _(u: Sum) -> Array:
    flat = low_rank(u)
    return generic.svdvals(Dense(u.dense()) if flat is None else flat)


@route(Sum, LowRank, cost=2.0)
def _concatenated(u: Sum) -> Update:
    return low_rank(u) or thin(u)


@route(Sum, Dense, cost=10.0)
def _form(u: Sum) -> Update:
    return Dense(u.dense())


@rowwise.register(Sum)
def _(u: Sum) -> Rows | None:
    parts = [rows for rows in map(rowwise, u.parts) if rows is not None]
    if len(parts) < len(u.parts):
        return None
    return lambda start, stop: Sum(tuple(need_delta(rows(start, stop)) for rows in parts))
