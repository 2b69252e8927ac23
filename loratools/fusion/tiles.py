"""True updates tile by tile: for rules that act on single entries, in bounded memory.

A tile is a block of whole rows, formed from the factors when needed and dropped again; no update is ever held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import ClassVar, Self

from loratools.core.update import Array, Delta, namespace
from loratools.fusion.combine import Zero, dtype_of
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg.namespace import topk_threshold, up, working_dtype

TILE = 1 << 20
"""Entries formed at a time."""

SAMPLE = 1 << 18
"""Entries looked at to guess where a threshold lies."""

Rows = Callable[[int, int], Array]
"""``rows(i, j)`` are rows i .. j of the matrix view, formed."""


@dataclass(frozen=True)
class Tiled(Delta):
    """An update known by its rows: ``rows(i, j)`` computes a block of its matrix view whenever it is needed."""

    kind: ClassVar[str] = "tiled"
    shape: tuple[int, ...]
    rows: Rows
    like: Array

    def ranges(self) -> list[tuple[int, int]]:
        """Return the rows of every tile."""
        return ranges(self.matrix_shape)

    def tiles(self) -> Iterator[tuple[int, Array]]:
        """Yield (first row, tile)."""
        return ((i, self.rows(i, j)) for i, j in self.ranges())

    def matmul(self, x: Array) -> Array:
        """Return D x, tile by tile; O(m n k) beside forming the tiles."""
        x = up(x, working_dtype(self.like, x))
        return namespace(x).concat([tile @ x for _, tile in self.tiles()], axis=0)

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y, tile by tile."""
        y = up(y, working_dtype(self.like, y))
        return reduce(add, (tile.mT @ y[i : i + tile.shape[0], :] for i, tile in self.tiles()))

    def dense(self) -> Array:
        """Return D in ``shape``."""
        return namespace(self.like).concat([tile for _, tile in self.tiles()], axis=0).reshape(self.shape)

    @classmethod
    def example(cls, seed: int) -> Self:
        """A low-rank update, known by its rows."""
        u = LowRank.example(seed)
        return cls(u.shape, reader(u), u.b)


def ranges(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the rows of every tile of a matrix."""
    m, n = shape
    step = max(1, TILE // n)
    return [(i, min(i + step, m)) for i in range(0, m, step)]


def reader(d: Delta) -> Rows:
    """Return the function that forms rows of an update: from its factors, or out of the whole where it has none."""
    low = low_rank(d)
    if low is None:
        x = up(d.matrix(), dtype_of([d]))
        return lambda i, j: x[i:j, :]
    b, a = low.factors()
    return lambda i, j: low.scale * (b[i:j, :] @ a)


Entrywise = Callable[[list[Array], range], Array]
"""Takes the tiles of all parts and their rows, returns the tile of the result."""


def tiled(deltas: Sequence[Delta], readers: Sequence[Rows], rule: Entrywise) -> Delta:
    """Return the update whose tiles are ``rule`` of the parts' tiles."""
    dtype = dtype_of(deltas)
    like = readers[0](0, 1)

    def rows(i: int, j: int) -> Array:
        return rule([up(read(i, j), dtype) for read in readers], range(i, j))

    return Tiled(deltas[0].shape, rows, up(like, dtype))


def alive(deltas: Sequence[Delta], weights: Sequence[float]) -> tuple[list[Delta], list[float]]:
    """Return the updates that are not known to be zero, with their weights: zeros neither vote nor count."""
    kept = [(d, w) for d, w in zip(deltas, weights, strict=True) if not isinstance(d, Zero)]
    return [d for d, _ in kept], [w for _, w in kept]


def kth_largest(rows: Rows, shape: tuple[int, int], k: int) -> float:
    """Return the k-th largest magnitude of a matrix that is formed tile by tile, exactly.

    A sample of evenly spaced rows brackets it; one pass counts what lies above the bracket and collects what lies in it
    (a few per cent). Where the sample misled, a second pass collects on the side that it missed.
    """
    size = shape[0] * shape[1]
    if size <= TILE:
        return float(topk_threshold(rows(0, shape[0]), k))
    low, high = _bracket(rows, shape, k / size)
    for bounds in ((low, high), (0.0, low), (high, float("inf"))):
        above, inside = _collected(rows, shape, *bounds)
        if 0 < k - above <= inside.shape[0]:
            return float(topk_threshold(inside, k - above))
    raise AssertionError("the three brackets cover every magnitude")


def _bracket(rows: Rows, shape: tuple[int, int], share: float) -> tuple[float, float]:
    """Return magnitudes that enclose the one of the given rank share, guessed from evenly spaced rows."""
    count = max(1, min(shape[0], SAMPLE // shape[1]))
    xp = namespace(rows(0, 1))
    sample = xp.concat([rows(i, i + 1) for i in (shape[0] * c // count for c in range(count))], axis=0)
    size = sample.shape[0] * sample.shape[1]
    margin = 0.02
    at = [max(1, min(size, round(size * s))) for s in (share + margin, share - margin)]
    return float(topk_threshold(sample, at[0])), float(topk_threshold(sample, at[1]))


def _collected(rows: Rows, shape: tuple[int, int], low: float, high: float) -> tuple[int, Array]:
    """Return how many magnitudes are > high, and those from low to high, both included."""
    above, inside = 0, []
    for i, j in ranges(shape):
        tile = rows(i, j)
        xp = namespace(tile)
        size = xp.abs(tile).reshape(-1)
        over = size > high
        above += int(xp.sum(over))
        inside.append(size[(size >= low) & ~over])
    return above, namespace(inside[0]).concat(inside)
