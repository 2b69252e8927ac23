"""ReplaceRows: some rows of a parameter stored whole (newly trained tokens of an embedding)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import ClassVar, Self

from loratools.core.rows import Rows, rowwise
from loratools.core.update import Array, Delta, Leaf, Update, kind, namespace, shape_of, working_dtype
from loratools.errors import FormatError, MismatchError
from loratools.linalg import seeds
from loratools.linalg.namespace import device_of, down, dtype_name, up


@kind("replace_rows")
class ReplaceRows(Update):
    """W' = W with row index[i] replaced by rows[i]: rows (k, ...), index of k distinct numbers, in any order.

    ``shape`` is that of the parameter; where a file does not say how many rows it has, as many as the largest index
    needs. Raises :class:`FormatError` where index, rows and shape disagree.
    """

    rows: Leaf | Array
    index: tuple[int, ...]
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        index, rows = tuple(int(i) for i in self.index), shape_of(self.rows)
        shape = tuple(self.shape) or (max(index, default=-1) + 1, *rows[1:])
        if len(rows) < 2 or rows[0] != len(index) or rows[1:] != shape[1:]:
            raise FormatError("the rows do not fit their index", expected=(len(index), *shape[1:]), got=rows)
        if len(set(index)) < len(index) or not all(0 <= i < shape[0] for i in index):
            expected = f"distinct numbers from 0 to {shape[0] - 1}"
            raise FormatError("an index of rows repeats or is out of range", expected=expected, got=sorted(index)[:10])
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "shape", shape)

    def apply(self, w: Array | None) -> Array:
        """Return W with its rows replaced, in the dtype of ``w``."""
        w = self._checked(w)
        rows = self.rows.read() if isinstance(self.rows, Leaf) else self.rows
        rows = rows if dtype_name(rows) == dtype_name(w) else down(up(rows), dtype_name(w))
        return namespace(w).concat(list(_woven(w, rows, self.index)))

    def delta(self, w: Array) -> Delta:
        """Return the difference, zero outside the rows, as an operator that holds only the rows."""
        w = self._checked(w)
        dtype = working_dtype(w, self.rows)
        return RowsDelta(up(self.rows, dtype) - up(_picked(w, self.index), dtype), self.index, shape_of(w))

    def _checked(self, w: Array | None) -> Array:
        if w is None or shape_of(w) != self.shape:
            got = "no base parameter" if w is None else shape_of(w)
            raise MismatchError("rows are replaced in a base parameter", expected=self.shape, got=got)
        return w

    @classmethod
    def example(cls, seed: int) -> Self:
        """Rows 4, 0 and 2 of a 6 x 7 parameter."""
        return cls(seeds.uniform(seeds.key_of(seed, "rows"), 3, 7) - 0.5, (4, 0, 2), (6, 7))


@dataclass(frozen=True)
class RowsDelta(Delta):
    """D = 0, but for row index[i] = rows[i]."""

    kind: ClassVar[str] = "rows delta"
    rows: Array
    index: tuple[int, ...]
    shape: tuple[int, ...]

    def dense(self) -> Array:
        """Return D in ``shape``."""
        xp = namespace(self.rows)
        zero = xp.zeros(self.shape, dtype=self.rows.dtype, device=self.rows.device)
        return xp.concat(list(_woven(zero, self.rows, self.index)))

    def _matrix(self, dtype: str) -> Array:
        return up(self.rows, dtype).reshape(len(self.index), -1)

    def matmul(self, x: Array) -> Array:
        """Return D x; O(k n) for each column."""
        dtype = working_dtype(self.rows, x)
        part = self._matrix(dtype) @ up(x, dtype)
        return RowsDelta(part, self.index, (self.shape[0], part.shape[1])).dense()

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y; O(k n) for each column."""
        dtype = working_dtype(self.rows, y)
        return self._matrix(dtype).T @ up(_picked(y, self.index), dtype)

    @classmethod
    def example(cls, seed: int) -> Self:
        """Rows 4, 0 and 2 of a 6 x 7 difference."""
        return cls(seeds.uniform(seeds.key_of(seed, "rows"), 3, 7) - 0.5, (4, 0, 2), (6, 7))


def _picked(w: Array, index: tuple[int, ...]) -> Array:
    xp = namespace(w)
    return xp.take(w, xp.asarray(list(index), dtype=xp.int64, device=device_of(w)), axis=0)


def _woven(w: Array, rows: Array, index: tuple[int, ...]) -> Iterator[Array]:
    """Yield, in order, the stretches of ``w`` between the indexed rows and, in between, those rows' new values."""
    order = sorted(range(len(index)), key=index.__getitem__)
    cuts = [-1, *(index[i] for i in order), w.shape[0]]
    for i, (before, after) in zip([*order, None], pairwise(cuts), strict=True):
        yield w[before + 1 : after, ...]
        if i is not None:
            yield rows[i : i + 1, ...]


@rowwise.register(ReplaceRows)
def _(u: ReplaceRows) -> Rows:
    values = cache(lambda: u.rows.read() if isinstance(u.rows, Leaf) else u.rows)  # read once, for the first rows

    def rows(start: int, stop: int) -> Update:
        inside = [i for i, row in enumerate(u.index) if start <= row < stop]
        part = _picked(values(), tuple(inside))
        return ReplaceRows(part, tuple(u.index[i] - start for i in inside), (stop - start, *u.shape[1:]))

    return rows
