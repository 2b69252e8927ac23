"""The K highest-scored entries of updates, in two passes over their tiles: a histogram, then an exact gathering."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import NamedTuple, TypeVar

from loratools.core.pool import parallel_map
from loratools.core.update import Array, Delta, namespace
from loratools.errors import LoratoolsError
from loratools.linalg import selection
from loratools.linalg.namespace import up
from loratools.ops.entries import tiles
from loratools.ops.masks import Scorer

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One parameter: its update and the scores of its entries."""

    name: str
    update: Delta
    score: Scorer

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.score.shape[0] * self.score.shape[1]


class Kept(NamedTuple):
    """The chosen entries: row-major positions (ascending), values in fp32, and |D|^2 of the whole update."""

    flat: Array
    values: Array
    square: float


class _Seen(NamedTuple):
    counts: Array
    square: float


class _Found(NamedTuple):
    """Entries above the boundary's bin, and those in it with their scores."""

    flat: Array
    values: Array
    edge_flat: Array
    edge_values: Array
    edge_scores: Array


def gather_each(sources: Sequence[Source], counts: Mapping[str, int]) -> dict[str, Kept]:
    """Return the ``counts[name]`` highest-scored entries of every update."""

    def one(source: Source) -> Kept:
        seen, k = _look(source), counts[source.name]
        edge, above = selection.boundary(seen.counts, k)
        found = _collect(source, edge)
        return _finished(found, selection.first_largest(found.edge_scores, k - above), seen.square)

    return dict(zip((s.name for s in sources), _each(one, sources), strict=True))


def gather_all(sources: Sequence[Source], k: int) -> dict[str, Kept]:
    """Return the ``k`` highest-scored entries of all updates together."""
    seen = _each(_look, sources)
    edge, above = selection.boundary(reduce(add, (one.counts for one in seen)), k)
    found = _each(lambda s: _collect(s, edge), sources)
    xp = namespace(found[0].edge_scores)
    chosen = selection.first_largest(xp.concat([f.edge_scores for f in found]), k - above)
    kept, start = {}, 0
    for source, look, part in zip(sources, seen, found, strict=True):
        stop = start + part.edge_scores.shape[0]
        mine = chosen[(chosen >= start) & (chosen < stop)] - start
        kept[source.name] = _finished(part, mine, look.square)
        start = stop
    return kept


def _each(work: Callable[[Source], T], sources: Sequence[Source]) -> list[T]:
    def named(source: Source) -> T:
        try:
            return work(source)
        except LoratoolsError as error:
            raise error.at(parameter=source.name) from error

    return parallel_map(named, sources, weights=[4 * s.size for s in sources])


def _look(source: Source) -> _Seen:
    counts, square = None, 0.0
    for start, stop, block in tiles(source.update):
        here = selection.histogram(selection.bins(source.score(start, stop, block)))
        counts = here if counts is None else counts + here
        square += float(up((block * block).sum(axis=1), "float64").sum())
    return _Seen(counts, square)


def _collect(source: Source, edge: int) -> _Found:
    n = source.score.shape[1]
    parts: list[_Found] = []
    for start, stop, block in tiles(source.update):
        scores = source.score(start, stop, block).reshape(-1)
        place, values = selection.bins(scores), block.reshape(-1)
        xp = namespace(block)
        sure, near = xp.nonzero(place > edge)[0], xp.nonzero(place == edge)[0]
        parts.append(_Found(sure + start * n, values[sure], near + start * n, values[near], scores[near]))
    xp = namespace(parts[0].values)
    return _Found(*(xp.concat(list(columns)) for columns in zip(*parts, strict=True)))


def _finished(found: _Found, chosen: Array, square: float) -> Kept:
    xp = namespace(found.values)
    flat = xp.concat([found.flat, found.edge_flat[chosen]])
    values = xp.concat([found.values, found.edge_values[chosen]])
    order = xp.argsort(flat, stable=True)
    return Kept(flat[order], values[order], square)
