"""KnOTS: merge in the coordinates of the joint left singular basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from loratools.core.update import Delta, namespace
from loratools.fusion.base import Between, Density, fusion
from loratools.fusion.canonical import canonical, left_singular, made
from loratools.fusion.combine import zero_of
from loratools.fusion.content import content_key
from loratools.fusion.elements import merged

Inner = Literal["sum", "ties", "dare-ties", "magnitude"]


@fusion(
    "knots",
    reference="arXiv:2410.19735",
    guarantee="exact basis, no dense update; rank at most the sum of ranks",
    identity={"density": 1.0},
    linear_limit={"rule": "sum"},
)
def knots(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    rule: Inner = "ties",
    density: Density = 0.2,
    scale: Annotated[float, Between(0)] = 1.0,
    seed: int = 0,
) -> Delta:
    """Merge {S V_i^T} of [D_1 ... D_n] = U S [V_1^T ... V_n^T] by a rule: sum, ties, dare-ties or magnitude.

    U comes from the canonical factors, so no update is formed. Trimming is per module and adapter. ``scale`` multiplies
    the result (the paper's lambda). O(m R^2 + n R sum r_i).
    """
    forms = [canonical(d) for d in deltas]
    xp = namespace(*(f.s for f in forms))
    tall = xp.concat([f.u * f.s for f in forms], axis=1)
    if tall.shape[1] == 0:
        return zero_of(deltas)
    u = left_singular(tall)
    parts = [((u.mT @ f.u) * f.s) @ f.vh for f in forms]
    keys = [content_key(d, seed) for d in deltas] if rule == "dare-ties" else [(0, 0)] * len(deltas)
    return made(deltas, u, scale * merged(rule, parts, weights, density, keys))
