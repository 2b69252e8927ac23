"""DARE with TIES' election of signs, on the true update."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Delta
from loratools.fusion.base import Density, fusion
from loratools.fusion.combine import zero_of
from loratools.fusion.content import content_key
from loratools.fusion.elements import Sign, dropped, elected
from loratools.fusion.tiles import alive, reader, tiled


@fusion(
    "dare-ties",
    reference="arXiv:2311.03099 with arXiv:2306.01708",
    guarantee="exact on the true update, masks fixed by seed and content; then truncated",
    identity={"density": 1.0},
)
def dare_ties(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: Density = 0.5,
    sign: Sign = "total",
    seed: int = 0,
) -> Delta:
    """Drop entries at random and rescale, elect a sign per entry, average those that agree with it."""
    parts, w = alive(deltas, weights)
    if not parts:
        return zero_of(deltas)
    keys = [content_key(d, seed) for d in parts]
    return tiled(
        parts,
        [reader(d) for d in parts],
        lambda xs, rows: elected([dropped(x, density, k, rows) for x, k in zip(xs, keys, strict=True)], w, sign),
    )
