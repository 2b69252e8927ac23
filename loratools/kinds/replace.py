"""Replace: a parameter stored whole, in place of the base's (heads, biases, norms, resized embeddings)."""

from __future__ import annotations

from typing import Self

from loratools.core.rows import Rows, rowwise, slice_rows
from loratools.core.update import Array, Delta, Leaf, Update, kind, shape_of, working_dtype
from loratools.errors import MismatchError
from loratools.kinds.dense import Dense
from loratools.linalg.namespace import down, dtype_name, up


@kind("replace")
class Replace(Update):
    """W' = value. The base may lack the parameter (a new head) or have it in another size (a resized vocabulary)."""

    value: Leaf | Array

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the stored value."""
        return shape_of(self.value)

    def apply(self, w: Array | None) -> Array:
        """Return the value, in the dtype of ``w`` where there is one."""
        value = self.value.read() if isinstance(self.value, Leaf) else self.value
        return value if w is None or dtype_name(w) == dtype_name(value) else down(up(value), dtype_name(w))

    def delta(self, w: Array) -> Delta:
        """Return value - W; both must have one shape."""
        if shape_of(w) != self.shape:
            raise MismatchError("the replaced parameter has another shape", expected=self.shape, got=shape_of(w))
        dtype = working_dtype(w, self.value)
        return Dense(up(self.value, dtype) - up(w, dtype))

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 7 replacement."""
        return cls(Dense.example(seed).d)


@rowwise.register(Replace)
def _(u: Replace) -> Rows:
    return lambda start, stop: Replace(slice_rows(u.value, start, stop))
