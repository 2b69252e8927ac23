"""PEFT's ``ties``."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Delta
from loratools.fusion.base import Density, fusion
from loratools.fusion.elements import Sign
from loratools.fusion.peft_factors import elected_unweighted, merged_factors, trimmed_factor


@fusion(
    "peft-ties",
    reference="PEFT add_weighted_adapter, combination_type=ties",
    guarantee="equals PEFT; acts on B and A apart, changes with the gauge; equal ranks",
    identity={"density": 1.0},
    gauge_free=False,
)
def peft_ties(
    deltas: Sequence[Delta], weights: Sequence[float], *, density: Density = 0.2, sign: Sign = "total"
) -> Delta:
    """TIES on the factors B and A apart, as PEFT does; ``ties`` acts on the update."""
    return merged_factors(
        deltas,
        weights,
        lambda xs, ws, _: elected_unweighted([trimmed_factor(x, density) for x in xs], ws, sign),
    )
