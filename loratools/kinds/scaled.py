"""Scaled: slices of the base parameter multiplied by learned numbers, as IA3 does (arXiv:2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from loratools.core import generic
from loratools.core.coat import Coat
from loratools.core.generic import transposed
from loratools.core.rows import Rows, rowwise, slice_rows
from loratools.core.update import Array, Delta, Leaf, kind, namespace, shape_of, working_dtype
from loratools.errors import FormatError
from loratools.kinds.dora import along
from loratools.kinds.formed import inner_formed
from loratools.linalg import seeds
from loratools.linalg.namespace import up


@kind("scaled")
class Scaled(Coat):
    """W' = gain * W along ``axis`` of the stored parameter; gain is a vector of length shape[axis]."""

    gain: Leaf | Array
    shape: tuple[int, ...]
    axis: int = 0

    def __post_init__(self) -> None:
        if shape_of(self.gain) != (self.shape[self.axis],):
            expected = (self.shape[self.axis],)
            raise FormatError("the gain does not fit the parameter", expected=expected, got=shape_of(self.gain))

    def delta(self, w: Array) -> Delta:
        """Return (gain - 1) * W as an operator."""
        base = self.checked(w)
        return ScaledDelta(base, up(self.gain, working_dtype(base)) - 1.0, self.axis)

    @classmethod
    def example(cls, seed: int) -> Self:
        """Gains near 1 of the rows of a 5 x 7 parameter."""
        return cls(seeds.uniform(seeds.key_of(seed, "scaled"), 5, 1)[:, 0] + 0.5, (5, 7))


@dataclass(frozen=True)
class ScaledDelta(Delta):
    """D = excess * base along ``axis``; the excess is gain - 1, so nothing cancels near the identity."""

    kind: ClassVar[str] = "scaled delta"
    base: Array
    excess: Array
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return shape_of(self.base)

    def dense(self) -> Array:
        """Return D in ``shape``."""
        return along(self.excess, self.axis, len(self.shape)) * self.base

    def matmul(self, x: Array) -> Array:
        """Return D x; O(m n k)."""
        w, x = self._operands(x)
        return self.excess[:, None] * (w @ x) if self.axis == 0 else w @ (self._columns() * x)

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y; O(m n k)."""
        w, y = self._operands(y)
        return w.T @ (self.excess[:, None] * y) if self.axis == 0 else self._columns() * (w.T @ y)

    def _operands(self, x: Array) -> tuple[Array, Array]:
        dtype = working_dtype(self.base, x)
        return up(self.base, dtype).reshape(self.matrix_shape), up(x, dtype)

    def _columns(self) -> Array:
        """Return the excess of every column of the matrix view, (columns, 1)."""
        xp = namespace(self.excess)
        return xp.broadcast_to(along(self.excess, self.axis - 1, len(self.shape) - 1), self.shape[1:]).reshape(-1, 1)

    @classmethod
    def example(cls, seed: int) -> Self:
        """The difference that the example of :class:`Scaled` makes to a random base."""
        u = Scaled.example(seed)
        return cls(seeds.uniform(seeds.key_of(seed, "base"), 5, 7) - 0.5, u.gain - 1.0)  # type: ignore[operator]


generic.inner.register(ScaledDelta)(inner_formed)


@rowwise.register(Scaled)
def _(u: Scaled) -> Rows:
    def rows(start: int, stop: int) -> Scaled:
        gain = slice_rows(u.gain, start, stop) if u.axis == 0 else u.gain
        return replace(u, gain=gain, shape=(stop - start, *u.shape[1:]))

    return rows


@transposed.register(Scaled)
def _(u: Scaled) -> Scaled:
    return Scaled(u.gain, u.shape[::-1], 1 - u.axis)
