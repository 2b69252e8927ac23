"""Spherical interpolation of two updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from loratools.core.update import Delta
from loratools.fusion.base import Between, fusion
from loratools.fusion.combine import combine
from loratools.fusion.scalars import arc, cosine, gram, shares


@fusion("slerp", reference="Shoemake 1985", guarantee="exact; rank is the sum of ranks", most=2)
def slerp(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    t: Annotated[float, Between(0, 1)] | None = None,
    colinear: Annotated[float, Between(0, 1)] = 0.9995,
) -> Delta:
    """Two updates on the arc between them: sin((1-t) a) / sin a D_1 + sin(t a) / sin a D_2.

    ``t`` is the second one's share of the weights unless given; beyond ``colinear`` (a cosine) the line replaces the
    arc. One adapter is returned times its weight.
    """
    if len(deltas) == 1:
        return combine(deltas, weights)
    at = shares(weights)[1] if t is None else t
    return combine(deltas, arc(cosine(gram(deltas)), at, colinear))
