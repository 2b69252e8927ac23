"""Multiplied: the base matrix times a learned matrix near the identity; rotations and reflections are such."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Self

from loratools.core import generic
from loratools.core.coat import Coat, loaded
from loratools.core.generic import need_delta, transposed
from loratools.core.rows import Rows, rowwise
from loratools.core.update import Array, Delta, kind, shape_of, working_dtype
from loratools.errors import FormatError
from loratools.kinds.block_diagonal import BlockDiagonal
from loratools.kinds.formed import inner_formed
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg import seeds
from loratools.linalg.namespace import up


@kind("multiplied")
class Multiplied(Coat):
    """W' = (1 + F) W for ``axis`` 0, W (1 + F) for ``axis`` 1, on the matrix view (shape[0], product of the rest).

    F is a square difference from the identity: block-diagonal for OFT (arXiv:2306.07280) and RoAd (arXiv:2409.00119),
    of low rank for HRA (arXiv:2405.17484), whose change is of the same rank then.
    """

    factor: Delta
    shape: tuple[int, ...]
    axis: int = 1

    def __post_init__(self) -> None:
        size = self.shape[0] if self.axis == 0 else prod(self.shape[1:])
        if self.factor.shape != (size, size):
            raise FormatError("the multiplier does not fit", expected=(size, size), got=self.factor.shape)

    def delta(self, w: Array) -> Delta:
        """Return F W or W F as an operator."""
        base = self.checked(w)
        return MultipliedDelta(base, loaded(self.factor, working_dtype(base)), self.axis)

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 8 parameter times four blocks."""
        return cls(BlockDiagonal.example(seed), (5, 8))


@dataclass(frozen=True)
class MultipliedDelta(Delta):
    """D = F W or W F: two products in a row."""

    kind: ClassVar[str] = "multiplied delta"
    base: Array
    factor: Delta
    axis: int = 1

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return shape_of(self.base)

    def dense(self) -> Array:
        """Return D in ``shape``; as cheap as the factor's product with n columns."""
        w = self.base.reshape(self.matrix_shape)
        d = self.factor.matmul(w) if self.axis == 0 else self.factor.rmatmul(w.T).T
        return d.reshape(self.shape)

    def matmul(self, x: Array) -> Array:
        """Return D x; O(m n k) and a product with F."""
        w, x = self._operands(x)
        return self.factor.matmul(w @ x) if self.axis == 0 else w @ self.factor.matmul(x)

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y; O(m n k) and a product with F."""
        w, y = self._operands(y)
        return w.T @ self.factor.rmatmul(y) if self.axis == 0 else self.factor.rmatmul(w.T @ y)

    def _operands(self, x: Array) -> tuple[Array, Array]:
        dtype = working_dtype(self.base, x)
        return up(self.base, dtype).reshape(self.matrix_shape), up(x, dtype)

    @classmethod
    def example(cls, seed: int) -> Self:
        """The difference that the example of :class:`Multiplied` makes to a random base."""
        return cls(seeds.uniform(seeds.key_of(seed, "base"), 5, 8) - 0.5, BlockDiagonal.example(seed))


generic.inner.register(MultipliedDelta)(inner_formed)


@low_rank.register(MultipliedDelta)
def _(u: MultipliedDelta) -> LowRank | None:
    flat = low_rank(u.factor)
    if flat is None:
        return None
    dtype = working_dtype(u.base, flat.b, flat.a)
    w, (b, a) = up(u.base, dtype).reshape(u.matrix_shape), flat.factors(dtype)
    b, a = (b, a @ w) if u.axis == 0 else (w @ b, a)
    return LowRank(b, a, flat.scale, u.shape)


@rowwise.register(Multiplied)
def _(u: Multiplied) -> Rows | None:
    if u.axis == 0:
        return None
    return lambda start, stop: replace(u, shape=(stop - start, *u.shape[1:]))


@transposed.register(Multiplied)
def _(u: Multiplied) -> Multiplied:
    return Multiplied(need_delta(transposed(u.factor)), u.shape[::-1], 1 - u.axis)
