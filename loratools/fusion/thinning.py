"""Random pruning of true updates: what DARE, DARE-TIES and DELLA have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loratools.core.update import Array, Delta
from loratools.fusion.combine import zero_of
from loratools.fusion.content import content_key
from loratools.fusion.tiles import alive, reader, tiled
from loratools.linalg.seeds import Key

Prune = Callable[[Array, Key, range], Array]
"""Takes a tile, the key of its adapter's random stream, and the tile's rows; returns the tile pruned."""

Merge = Callable[[list[Array], list[float]], Array]
"""Takes the pruned tiles of all adapters and their weights."""


def thinned(deltas: Sequence[Delta], weights: Sequence[float], seed: int, prune: Prune, merge: Merge) -> Delta:
    """Return the update whose tiles are ``merge`` of the adapters' pruned tiles; streams are keyed by content."""
    parts, w = alive(deltas, weights)
    if not parts:
        return zero_of(deltas)
    keys = [content_key(d, seed) for d in parts]

    def rule(tiles: list[Array], rows: range) -> Array:
        return merge([prune(x, key, rows) for x, key in zip(tiles, keys, strict=True)], w)

    return tiled(parts, [reader(d) for d in parts], rule)
