"""Projections that all modules of a file share: every module takes the first columns of A and the first rows of B."""

from __future__ import annotations

from typing import NamedTuple

from loratools.core.lazy import Tensor, computed
from loratools.core.update import Leaf, shape_of
from loratools.errors import FormatError
from loratools.formats.peft.tuner import Model
from loratools.kinds.lowrank import LowRank
from loratools.leaf import Array
from loratools.linalg.namespace import up, working_dtype


class Projections(NamedTuple):
    """A (r, widest) and B (tallest, r)."""

    a: Tensor
    b: Tensor

    def factors(self, shape: tuple[int, ...], rows: Leaf, middle: Leaf) -> LowRank:
        """Return diag(rows) B diag(middle) A for a weight of ``shape`` (out, in); read when used."""
        (rank, width), tall = shape_of(self.a), shape_of(self.b)
        (out, n), count = shape, middle.shape
        if rows.shape != (out,) or tall[1:] != count or rank < count[0] or width < n or tall[0] < out:
            got = f"A {(rank, width)}, B {tall}, vectors {rows.shape} and {count}"
            raise FormatError("the shared projections do not fit the weight", expected=shape, got=got)
        dtype = working_dtype(self.a, self.b, rows, middle)

        def left() -> Array:
            b = self.b.rows(0, out) if isinstance(self.b, Leaf) else self.b[:out]
            return up(rows, dtype)[:, None] * up(b, dtype)

        def right() -> Array:
            return up(middle, dtype)[:, None] * up(self.a, dtype)[: count[0], :n]

        return LowRank(computed((out, count[0]), left, dtype), computed((count[0], n), right, dtype))


def narrowed(a: Array, b: Array, model: Model) -> Projections:
    """Return drawn projections as PEFT holds them for the modules, whose weights are of one dtype."""
    return Projections(model.placed[0].as_held(a), model.placed[0].as_held(b))
