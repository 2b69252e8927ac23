"""The difference of two stored parameters as an update that is read by rows, whenever it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from loratools.core.rows import Rows, rowwise
from loratools.core.update import Array, Delta, Leaf, Update, working_dtype
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import up


@dataclass(frozen=True)
class Streamed(Delta):
    """D = tuned - base, of two leaves of one shape; no more than the rows asked for is in memory."""

    kind: ClassVar[str] = "difference"
    base: Leaf
    tuned: Leaf

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the parameter."""
        return self.tuned.shape

    def rows(self, start: int, stop: int) -> Array:
        """Return rows start .. stop of the first axis, fp32 (fp64 of fp64 models)."""
        dtype = working_dtype(self.base, self.tuned)
        return up(self.tuned.rows(start, stop), dtype) - up(self.base.rows(start, stop), dtype)

    def dense(self) -> Array:
        """Return D in ``shape``, formed."""
        return self.rows(0, self.shape[0])

    def matmul(self, x: Array) -> Array:
        """Return D x."""
        return Dense(self.dense()).matmul(x)

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y."""
        return Dense(self.dense()).rmatmul(y)

    @classmethod
    def example(cls, seed: int) -> Self:
        """A low-rank difference from zero."""
        new = up(LowRank.example(seed).dense())
        shape = tuple(int(n) for n in new.shape)
        return cls(Leaf(shape, "float32", lambda out: 0 * new), Leaf(shape, "float32", lambda out: new))


@rowwise.register(Streamed)
def _(u: Streamed) -> Rows:
    def rows(start: int, stop: int) -> Update:
        return Dense(u.rows(start, stop))

    return rows
