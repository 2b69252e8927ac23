"""Magnitude pruning on the true update."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Delta
from loratools.fusion.base import Density, fusion
from loratools.fusion.combine import zero_of
from loratools.fusion.elements import trim, weighted_sum
from loratools.fusion.tiles import alive, reader, tiled
from loratools.fusion.trimming import cuts


@fusion(
    "magnitude",
    reference="arXiv:1506.02626",
    guarantee="exact on the true update, tile by tile; then truncated (the report says what that cost)",
    identity={"density": 1.0},
    linear_limit={"density": 1.0},
)
def magnitude(deltas: Sequence[Delta], weights: Sequence[float], *, density: Density = 0.5) -> Delta:
    """Keep the largest entries of each update, a share ``density`` per module, and sum them with weights."""
    parts, w = alive(deltas, weights)
    if not parts:
        return zero_of(deltas)
    readers = [reader(d) for d in parts]
    limits = cuts(readers, parts[0].matrix_shape, density)
    return tiled(parts, readers, lambda xs, _: weighted_sum([trim(x, t) for x, t in zip(xs, limits, strict=True)], w))
