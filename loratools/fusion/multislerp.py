"""Spherical mean of any number of updates, in one step."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Delta
from loratools.fusion.base import fusion
from loratools.fusion.combine import combine
from loratools.fusion.scalars import gram, norms, shares, unit_sum


@fusion("multislerp", reference="mergekit, Multi-SLERP", guarantee="exact; rank is the sum of ranks")
def multislerp(deltas: Sequence[Delta], weights: Sequence[float], *, normalize: bool = True) -> Delta:
    """Mean direction of the updates times their mean norm.

    sum (w_i / |D_i|) D_i, normalised, times sum w_i |D_i|. The tangent step of the published form vanishes identically
    with normalised weights, so this is all of it. ``normalize`` = false keeps the weights' sum in the size.
    """
    g = gram(deltas)
    w = shares(weights) if normalize else list(weights)
    size = sum(wi * x for wi, x in zip(w, norms(g), strict=True))
    return combine(deltas, [size * c for c in unit_sum(g, w)])
