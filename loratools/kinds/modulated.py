"""Modulated: the base parameter multiplied element by element, as HiRA and GLoRA do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import ClassVar, Self

from loratools.core import generic
from loratools.core.coat import Coat, loaded
from loratools.core.generic import need_delta, transposed
from loratools.core.rows import Rows, row_ranges, rowwise
from loratools.core.update import Array, Delta, kind, namespace, shape_of, working_dtype
from loratools.kinds.formed import inner_formed
from loratools.kinds.lowrank import LowRank
from loratools.linalg import seeds
from loratools.linalg.namespace import dtype_name, up

BLOCK_BYTES = 8 << 20  # of rows of W taken at once


@kind("modulated")
class Modulated(Coat):
    """W' = W o (1 + F), element by element; F is any difference of the same shape (low-rank in HiRA)."""

    factor: Delta

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return self.factor.shape

    def delta(self, w: Array) -> Delta:
        """Return W o F as an operator."""
        base = self.checked(w)
        return ModulatedDelta(base, loaded(self.factor, working_dtype(base)))

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 7 parameter under a factor of rank 3."""
        return cls(LowRank.example(seed))


@dataclass(frozen=True)
class ModulatedDelta(Delta):
    """D = base o F, formed some rows at a time: for a factor of rank r that is cheaper than r products with W."""

    kind: ClassVar[str] = "modulated delta"
    base: Array
    factor: Delta

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return shape_of(self.base)

    def dense(self) -> Array:
        """Return D in ``shape``."""
        return self.base * self.factor.dense()

    def matmul(self, x: Array) -> Array:
        """Return D x; O(m n (r + k))."""
        x = up(x, working_dtype(self.base, x))
        return namespace(x).concat([part @ x for _, part in self._rows(dtype_name(x))])

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y; O(m n (r + k))."""
        y = up(y, working_dtype(self.base, y))
        return reduce(add, (part.T @ y[start : start + part.shape[0], :] for start, part in self._rows(dtype_name(y))))

    def _rows(self, dtype: str) -> Iterator[tuple[int, Array]]:
        """Yield the rows of the matrix view in blocks, each with the number of its first."""
        w = up(self.base, dtype).reshape(self.matrix_shape)
        rows = rowwise(self.factor)
        for start, stop in row_ranges(w, BLOCK_BYTES) if rows is not None else [(0, w.shape[0])]:
            part = self.factor if rows is None else need_delta(rows(start, stop))
            yield start, w[start:stop, :] * up(part.matrix(), dtype)

    @classmethod
    def example(cls, seed: int) -> Self:
        """The difference that the example of :class:`Modulated` makes to a random base."""
        return cls(seeds.uniform(seeds.key_of(seed, "base"), 5, 7) - 0.5, LowRank.example(seed))


generic.inner.register(ModulatedDelta)(inner_formed)


@rowwise.register(Modulated)
def _(u: Modulated) -> Rows | None:
    rows = rowwise(u.factor)
    return None if rows is None else lambda start, stop: Modulated(need_delta(rows(start, stop)))


@transposed.register(Modulated)
def _(u: Modulated) -> Modulated:
    return Modulated(need_delta(transposed(u.factor)))
