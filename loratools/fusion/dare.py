"""DARE on the true update."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Delta
from loratools.fusion.base import Density, fusion
from loratools.fusion.elements import dropped, weighted_sum
from loratools.fusion.thinning import thinned


@fusion(
    "dare",
    reference="arXiv:2311.03099",
    guarantee="the weighted sum in expectation; masks fixed by seed and content; then truncated",
    identity={"density": 1.0},
    linear_limit={"density": 1.0},
)
def dare(deltas: Sequence[Delta], weights: Sequence[float], *, density: Density = 0.5, seed: int = 0) -> Delta:
    """Drop entries at random, divide the rest by ``density``, sum with weights.

    The mask of an adapter depends on the seed and on its own content, not on its place among the inputs. It injects
    noise of relative size sqrt((1 - density) / density), most of which a low rank cannot hold.
    """
    return thinned(deltas, weights, seed, lambda x, key, rows: dropped(x, density, key, rows), weighted_sum)
