"""PEFT's ``dare_ties``."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Array, Delta
from loratools.fusion.base import Density, fusion
from loratools.fusion.content import content_key
from loratools.fusion.elements import Sign, dropped
from loratools.fusion.peft_factors import elected_unweighted, merged_factors
from loratools.fusion.tiles import alive


@fusion(
    "peft-dare-ties",
    reference="PEFT add_weighted_adapter, combination_type=dare_ties",
    guarantee="PEFT's formula with seeded masks; acts on B and A apart, changes with the gauge; equal ranks",
    identity={"density": 1.0},
    gauge_free=False,
)
def peft_dare_ties(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: Density = 0.5,
    sign: Sign = "total",
    seed: int = 0,
) -> Delta:
    """DARE on the factors B and A apart, then PEFT's election of signs; masks are keyed by content."""
    present, _ = alive(deltas, weights)
    keys = {side: [content_key(d, seed, side) for d in present] for side in "ab"}

    def merge(xs: list[Array], ws: list[float], side: str) -> Array:
        parts = [dropped(x, density, k) for x, k in zip(xs, keys[side], strict=True)]
        return elected_unweighted(parts, ws, sign)

    return merged_factors(deltas, weights, merge)
