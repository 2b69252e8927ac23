"""Sparse: an update of few entries, kept row by row (CSR), as SHiRA adapters are (arXiv:2406.13175)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Self

from loratools.core import generic
from loratools.core.routes import route
from loratools.core.rows import Rows, rowwise
from loratools.core.update import Array, Delta, Leaf, Update, kind, namespace, shape_of, working_dtype
from loratools.errors import FormatError, MismatchError, NumericsError
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank
from loratools.linalg import seeds
from loratools.linalg.namespace import all_finite, cast, device_of, down, dtype_name, scatter_add, up

SHORT = 1 << 16  # columns that 16 bits can number
CHUNK = 1 << 20  # entries worked on at once where each needs a row of a factor


@kind("sparse")
class Sparse(Delta):
    """D = scale * values at (row, column), zero elsewhere, on the matrix view (shape[0], product of the rest).

    ``rows`` (m + 1,) says where each row begins among ``columns`` and ``values`` (nnz,); columns ascend within a row.
    ``base`` (nnz,), optional, are the base's own values there, for undoing a switch bit for bit. Raises
    :class:`FormatError` where sizes disagree; what the index says is checked when it is first used.
    """

    rows: Leaf | Array
    columns: Leaf | Array
    values: Leaf | Array
    shape: tuple[int, ...]
    scale: float = 1.0
    base: Leaf | Array | None = None

    def __post_init__(self) -> None:
        shape, count = tuple(int(n) for n in self.shape), shape_of(self.values)
        object.__setattr__(self, "shape", shape)
        sizes = [shape_of(t) for t in (self.columns, *(() if self.base is None else (self.base,)))]
        if len(shape) < 1 or shape_of(self.rows) != (shape[0] + 1,) or len(count) != 1 or set(sizes) != {count}:
            got = f"rows {shape_of(self.rows)}, columns {shape_of(self.columns)}, values {count}"
            raise FormatError(
                "the parts of a sparse update disagree", expected=f"{shape[:1]} + 1 rows, one size", got=got
            )

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return shape_of(self.values)[0]

    @property
    def density(self) -> float:
        """Stored entries over all entries."""
        return self.nnz / prod(self.shape)

    def numbers(self, dtype: str | None = None) -> Array:
        """Return scale * values (nnz,) for arithmetic."""
        return self.scale * up(self.values, dtype or working_dtype(self.values))

    def places(self) -> tuple[Array, Array]:
        """Return row and column of every entry, int64 (nnz,). Raises FormatError for an index out of range or order."""
        counts, columns = self._index()
        xp = namespace(columns)
        row = xp.repeat(xp.arange(self.shape[0], dtype=xp.int64, device=device_of(columns)), counts)
        self._check(counts, columns, row * self.matrix_shape[1] + columns)
        return row, columns

    def flat(self) -> Array:
        """Return row-major positions in the matrix view, ascending, int64 (nnz,). Raises as :meth:`places`."""
        counts, columns = self._index()
        xp, (m, n) = namespace(columns), self.matrix_shape
        flat = xp.repeat(xp.arange(m, dtype=xp.int64, device=device_of(columns)) * n, counts) + columns
        self._check(counts, columns, flat)
        return flat

    def _index(self) -> tuple[Array, Array]:
        """Return the number of entries per row and the columns, both int64."""
        starts, columns = (cast(t.read() if isinstance(t, Leaf) else t, "int64") for t in (self.rows, self.columns))
        counts = starts[1:] - starts[:-1]
        if int(starts[0]) != 0 or int(starts[-1]) != self.nnz or bool(namespace(counts).any(counts < 0)):
            raise FormatError("the row pointers of a sparse update are broken", expected=f"ascending, 0 to {self.nnz}")
        return counts, columns

    def _check(self, counts: Array, columns: Array, flat: Array) -> None:
        """Raise FormatError unless columns are in range and ascend in every row.

        They do if the positions ascend and no row begins before its first column or ends behind its last.
        """
        xp, n = namespace(flat), self.matrix_shape[1]
        filled, ends = counts > 0, xp.cumulative_sum(counts)
        last = columns[ends[filled] - 1]
        first = columns[(ends - counts)[filled]]
        if bool(xp.all(flat[1:] > flat[:-1])) and not bool(xp.any((first < 0) | (last >= n))):
            return
        if int(xp.min(columns)) < 0 or int(xp.max(columns)) >= n:
            raise FormatError("a column of a sparse update is out of range", expected=f"0 to {n - 1}")
        raise FormatError("columns of a sparse update repeat or do not ascend within their row")

    def matmul(self, x: Array) -> Array:
        """Return D x; O(nnz k), summed in fp64."""
        row, column = self.places()
        return self._product(x, column, row, self.matrix_shape[0])

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y; O(nnz k), summed in fp64."""
        row, column = self.places()
        return self._product(y, row, column, self.matrix_shape[1])

    def _product(self, x: Array, source: Array, target: Array, size: int) -> Array:
        dtype = working_dtype(self.values, x)
        x, values = up(x, dtype), self.numbers(dtype)
        xp = namespace(values)
        columns = [scatter_add(size, target, values * xp.take(x[:, j], source)) for j in range(x.shape[1])]
        return xp.stack(columns, axis=1)

    def dense(self) -> Array:
        """Return D in ``shape``, formed."""
        values = self.numbers()
        xp = namespace(values)
        out = xp.zeros(prod(self.shape), dtype=values.dtype, device=device_of(values))
        out[self.flat()] = values
        return out.reshape(self.shape)

    def apply(self, w: Array | None) -> Array:
        """Return W with the entries added and rounded once; all others keep their bits."""
        if w is None:
            return self.dense()
        if shape_of(w) != self.shape:
            raise MismatchError("the update does not fit the parameter", expected=self.shape, got=shape_of(w))
        xp, flat = namespace(w), self.flat()
        out = xp.asarray(w, copy=True).reshape(-1)
        dtype = working_dtype(w)
        out[flat] = down(up(out[flat], dtype) + self.numbers(dtype), dtype_name(w))
        return out.reshape(self.shape)

    @classmethod
    def example(cls, seed: int) -> Self:
        """Nine of 35 entries, scaled by 2; one row is empty."""
        flat = (0, 3, 6, 8, 14, 20, 28, 30, 34)
        u = seeds.uniform(seeds.key_of(seed, "sparse"), 1, len(flat))[0, :] - 0.5
        xp = namespace(u)
        made = of_entries(xp.asarray(flat), u, (5, 7))
        return cls(made.rows, made.columns, made.values, (5, 7), 2.0)


def of_entries(
    flat: Array, values: Array, shape: tuple[int, ...], *, dtype: str | None = None, base: Array | None = None
) -> Sparse:
    """Return the update with ``values`` at ascending distinct row-major positions ``flat`` (int64), scale 1.

    Columns are stored in 16 bits where these can number them, else in 32; values in ``dtype`` (default: their own).
    """
    xp = namespace(values)
    m, n = shape[0], prod(shape[1:])
    row, column = flat // n, flat % n
    counts = scatter_add(m, row, xp.ones(values.shape, dtype=xp.float64, device=device_of(values)))
    starts = cast(xp.cumulative_sum(counts, include_initial=True), "int64" if values.shape[0] >> 31 else "int32")
    stored = values if dtype is None else down(values, dtype)
    if not all_finite(stored):
        raise NumericsError("a value of the sparse update is not finite")
    return Sparse(starts, cast(column, "uint16" if n <= SHORT else "uint32"), stored, shape, base=base)


def coalesced(row: Array, column: Array, values: Array, shape: tuple[int, ...]) -> Sparse:
    """Return the update of entries in any order; repeated places add up (in fp32, or fp64 for fp64 values).

    Raises :class:`FormatError` for a place outside the parameter.
    """
    xp, n = namespace(values), prod(shape[1:])
    row, column = cast(row, "int64"), cast(column, "int64")
    for index, size in ((row, shape[0]), (column, n)):
        if index.shape[0] and (int(xp.min(index)) < 0 or int(xp.max(index)) >= size):
            got = int(xp.min(index)), int(xp.max(index))
            raise FormatError("an index of a sparse update is out of range", expected=f"0 to {size - 1}", got=got)
    flat = row * n + column
    if bool(xp.all(flat[1:] > flat[:-1])):
        return of_entries(flat, values, shape)
    order = xp.argsort(flat, stable=True)
    flat, values = xp.take(flat, order), xp.take(values, order)
    first = xp.concat([xp.ones_like(flat[:1]), xp.astype(flat[1:] != flat[:-1], flat.dtype)])
    if not bool(xp.all(first == 1)):
        places = xp.cumulative_sum(first) - 1
        dtype = dtype_name(values)
        values = down(scatter_add(int(places[-1]) + 1, places, up(values, working_dtype(values))), dtype)
        flat = flat[first == 1]
    return of_entries(flat, values, shape)


@generic.transposed.register(Sparse)
def _(u: Sparse) -> Sparse:
    row, column = u.places()
    base = None if u.base is None else coalesced(column, row, up(u.base), u.shape[::-1]).values
    return replace(coalesced(column, row, up(u.values), u.shape[::-1]), scale=u.scale, base=base)


@generic.inner.register(Sparse)
def _(u: Sparse, v: Delta) -> float:
    if u.matrix_shape != v.matrix_shape:
        raise MismatchError("inner product of different shapes", expected=u.shape, got=v.shape)
    if isinstance(v, Sparse):
        mine, other = common(u.flat(), v.flat())
        xp = namespace(mine)
        return float((xp.take(u.numbers("float64"), mine) * xp.take(v.numbers("float64"), other)).sum())
    if isinstance(v, LowRank):
        return _with_factors(u, v)
    return float(generic.inner.dispatch(Update)(u, v))


def common(first: Array, second: Array) -> tuple[Array, Array]:
    """Return where the numbers that two ascending lists share stand in each of them."""
    xp = namespace(first)
    if not second.shape[0]:
        return first[:0], second[:0]
    at = xp.searchsorted(second, first)
    hit = xp.take(second, xp.where(at < second.shape[0], at, 0)) == first
    return xp.nonzero(hit)[0], at[hit]


def _with_factors(u: Sparse, v: LowRank) -> float:
    """Return the sum of values * (b a)[row, column], a chunk of entries at a time; O(nnz r)."""
    (row, column), values = u.places(), u.numbers("float64")
    b, a = v.factors()
    a = a.mT
    xp = namespace(values)
    step, total = max(1, CHUNK // v.rank), 0.0
    for i in range(0, u.nnz, step):
        products = xp.take(b, row[i : i + step], axis=0) * xp.take(a, column[i : i + step], axis=0)
        total += float((values[i : i + step] * up(products, "float64").sum(axis=1)).sum())
    return v.scale * total


def united(parts: Iterable[Sparse]) -> tuple[Array, list[Array]]:
    """Return the union of the supports (ascending row-major positions) and, per part, where its entries stand there."""
    found = [u.flat() for u in parts]
    xp = namespace(*found)
    union = xp.sort(xp.unique_values(xp.concat(found)))
    return union, [xp.searchsorted(union, flat) for flat in found]


@route(Sparse, Dense, cost=10.0)
def _form(u: Sparse) -> Update:
    return Dense(u.dense())


@rowwise.register(Sparse)
def _(u: Sparse) -> Rows:
    n = prod(u.shape[1:])
    kept: list[tuple[Array, Array, Array]] = []  # read and checked once, for the first rows

    def rows(start: int, stop: int) -> Update:
        if not kept:
            starts, columns, values = (t.read() if isinstance(t, Leaf) else t for t in (u.rows, u.columns, u.values))
            u.places()
            kept.append((cast(starts, "int64"), columns, values))
        starts, columns, values = kept[0]
        i, j = int(starts[start]), int(starts[stop])
        part = starts[start : stop + 1] - i
        shape = (stop - start, *u.shape[1:]) if n else u.shape
        return replace(u, rows=part, columns=columns[i:j], values=values[i:j], shape=shape, base=None)

    return rows
