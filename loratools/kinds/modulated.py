"""Modulated: the base parameter multiplied element by element, as HiRA and GLoRA do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from loratools.core.coat import Coat, loaded
from loratools.core.generic import need_delta, transposed
from loratools.core.rows import Rows, rowwise
from loratools.core.update import Array, Delta, kind, shape_of, working_dtype
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg import seeds
from loratools.linalg.namespace import up


@kind("modulated")
@dataclass(frozen=True)
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
    """D = base o F. With F = sum_j b_j a_j^T, D x = sum_j b_j o (W (a_j o x)): nothing of W's size is formed."""

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
        """Return D x; O(m n r k) for a factor of rank r, formed where it has none."""
        return self._product(x, transposed=False)

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y; cost as for :meth:`matmul`."""
        return self._product(y, transposed=True)

    def _product(self, x: Array, *, transposed: bool) -> Array:
        dtype = working_dtype(self.base, x)
        w, x = up(self.base, dtype).reshape(self.matrix_shape), up(x, dtype)
        flat = low_rank(self.factor)
        if flat is None:
            d = w * self.factor.matrix()
            return d.T @ x if transposed else d @ x
        b, a = flat.factors(dtype)
        w, left, right = (w.T, a.T, b.T) if transposed else (w, b, a)
        parts = (left[:, j : j + 1] * (w @ (right[j, :][:, None] * x)) for j in range(flat.rank))
        total = next(parts)
        for part in parts:
            total = total + part
        return flat.scale * total

    @classmethod
    def example(cls, seed: int) -> Self:
        """The difference that the example of :class:`Modulated` makes to a random base."""
        return cls(seeds.uniform(seeds.key_of(seed, "base"), 5, 7) - 0.5, LowRank.example(seed))


@rowwise.register(Modulated)
def _(u: Modulated) -> Rows | None:
    rows = rowwise(u.factor)
    return None if rows is None else lambda start, stop: Modulated(need_delta(rows(start, stop)))


@transposed.register(Modulated)
def _(u: Modulated) -> Modulated:
    return Modulated(need_delta(transposed(u.factor)))
