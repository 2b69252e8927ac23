"""PEFT's ``dare_linear``."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Delta
from loratools.fusion.base import Density, fusion
from loratools.fusion.content import content_key
from loratools.fusion.elements import dropped, weighted_sum
from loratools.fusion.peft_factors import merged_factors
from loratools.fusion.tiles import alive


@fusion(
    "peft-dare-linear",
    reference="PEFT add_weighted_adapter, combination_type=dare_linear",
    guarantee="PEFT's formula with seeded masks; acts on B and A apart, changes with the gauge; equal ranks",
    identity={"density": 1.0},
    gauge_free=False,
)
def peft_dare_linear(
    deltas: Sequence[Delta], weights: Sequence[float], *, density: Density = 0.5, seed: int = 0
) -> Delta:
    """DARE on the factors B and A apart, then PEFT's linear; PEFT cannot seed its masks, ours are keyed by content."""
    present, _ = alive(deltas, weights)
    keys = {side: [content_key(d, seed, side) for d in present] for side in "ab"}
    return merged_factors(
        deltas,
        weights,
        lambda xs, ws, side: weighted_sum([dropped(x, density, k) for x, k in zip(xs, keys[side], strict=True)], ws),
    )
