"""What updates with a few coefficients in a fast basis have in common: D = scale * U_m S U_n^T, S sparse.

A subclass says how its basis is applied to columns; products, transposes, norms and factors follow.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Self

from loratools.core.update import Array, Delta, Leaf, namespace, shape_of, working_dtype
from loratools.errors import FormatError
from loratools.linalg.namespace import cast, scatter_add, up


@dataclass(frozen=True)
class Spectral(Delta):
    """``spectrum`` (n,) at distinct places (``rows``, ``columns``), each int64 (n,), of S."""

    spectrum: Leaf | Array
    rows: Leaf | Array
    columns: Leaf | Array
    shape: tuple[int, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        sizes = {shape_of(t) for t in (self.spectrum, self.rows, self.columns)}
        if len(sizes) != 1 or len(next(iter(sizes))) != 1 or len(self.shape) != 2:
            raise FormatError("coefficients and places disagree", expected="three of one length", got=sorted(sizes))

    @abstractmethod
    def forward(self, coefficients: Array, size: int) -> Array:
        """Return U_size c for the coefficients (all of them, k) of every column -> (size, k)."""

    @abstractmethod
    def adjoint(self, x: Array, size: int) -> Array:
        """Return U_size^T x for x (size, k) -> (all coefficients, k)."""

    @abstractmethod
    def count(self, size: int) -> int:
        """Return how many coefficients the basis of a vector of ``size`` has."""

    def places(self) -> tuple[Array, Array]:
        """Read rows and columns, int64."""
        rows, columns = (cast(t.read() if isinstance(t, Leaf) else t, "int64") for t in (self.rows, self.columns))
        return rows, columns

    def matmul(self, x: Array) -> Array:
        """Return D x; two fast transforms of every column and n multiplications."""
        rows, columns = self.places()
        return self._product(x, rows, columns, *self.shape)

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y; as :meth:`matmul`."""
        rows, columns = self.places()
        return self._product(y, columns, rows, *self.shape[::-1])

    def _product(self, x: Array, target: Array, source: Array, out: int, width: int) -> Array:
        dtype = working_dtype(self.spectrum, x)
        x, v = up(x, dtype), up(self.spectrum, dtype)
        xp = namespace(x, v)
        met = v[:, None] * xp.take(self.adjoint(x, width), source, axis=0)
        return self._real(self.forward(spread(target, met, self.count(out)), out))

    def dense(self) -> Array:
        """Return D in ``shape``, formed by fast transforms of both sides."""
        rows, columns = self.places()
        v = up(self.spectrum, working_dtype(self.spectrum))
        m, n = self.count(self.shape[0]), self.count(self.shape[1])
        s = scatter_add(m * n, rows * n + columns, v).reshape(m, n)
        half = self.forward(s, self.shape[0])
        xp = namespace(half)
        return self._real(xp.matrix_transpose(self.forward(xp.matrix_transpose(half), self.shape[1])))

    def _real(self, x: Array) -> Array:
        xp = namespace(x)
        return self.scale * (xp.real(x) if xp.isdtype(x.dtype, "complex floating") else x)

    def thin(self) -> tuple[Array, Array, bool]:
        """Return (places, S, is_rows): S with only the rows, or only the columns, that hold anything.

        The fewer of the two; S is (places, other side's coefficients). Its size is a bound of the rank.
        """
        rows, columns = self.places()
        xp = namespace(rows)
        by_row = shape_of(xp.unique_values(rows))[0] <= shape_of(xp.unique_values(columns))[0]
        mine, other = (rows, columns) if by_row else (columns, rows)
        places = xp.sort(xp.unique_values(mine))
        v = up(self.spectrum, working_dtype(self.spectrum))
        size = self.count(self.shape[1] if by_row else self.shape[0])
        flat = xp.searchsorted(places, mine) * size + other
        return places, scatter_add(shape_of(places)[0] * size, flat, v).reshape(-1, size), by_row

    def transposed(self) -> Self:
        """Return D^T."""
        return replace(self, rows=self.columns, columns=self.rows, shape=self.shape[::-1])


def spread(target: Array, values: Array, size: int) -> Array:
    """Return (size, k) zeros with rows ``values`` (n, k), real or complex, added at ``target`` (n,)."""
    xp = namespace(values)
    k = values.shape[1]
    flat = (target[:, None] * k + xp.arange(k)).reshape(-1)
    if xp.isdtype(values.dtype, "complex floating"):
        real, imaginary = (scatter_add(size * k, flat, part(values).reshape(-1)) for part in (xp.real, xp.imag))
        return (real + 1j * imaginary).reshape(size, k)
    return scatter_add(size * k, flat, values.reshape(-1)).reshape(size, k)
