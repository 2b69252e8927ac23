"""DARE with TIES' election of signs, on the true update."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Delta
from loratools.fusion.base import Density, fusion
from loratools.fusion.elements import Sign, dropped, elected
from loratools.fusion.thinning import thinned


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
    return thinned(
        deltas,
        weights,
        seed,
        lambda x, key, rows: dropped(x, density, key, rows),
        lambda tiles, w: elected(tiles, w, sign),
    )
