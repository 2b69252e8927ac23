"""The Riemannian mean on the sphere."""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, cos, sin
from typing import Annotated

from loratools.core.update import Delta
from loratools.errors import NumericsError
from loratools.fusion.base import Between, fusion
from loratools.fusion.combine import combine
from loratools.fusion.scalars import Gram, gram, inverses, norm_of, norms, product, shares, unit_sum


@fusion("karcher", reference="Karcher 1977", guarantee="exact; rank is the sum of ranks")
def karcher(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    iterations: Annotated[int, Between(1)] = 100,
    tolerance: Annotated[float, Between(0)] = 1e-10,
) -> Delta:
    """Karcher mean of the directions times the mean norm: the point with the least weighted squared angles.

    Logarithm, weighted mean, exponential, until the step is below ``tolerance``; everything stays in the span of the
    updates, so the iteration runs on n coefficients.
    """
    g, w = gram(deltas), shares(weights)
    units = inverses(norms(g))
    at = unit_sum(g, w)
    if not any(at):
        return combine(deltas, at)
    for _ in range(iterations):
        step = _mean_logarithm(g, units, w, at)
        size = norm_of(g, step)
        if size <= tolerance:
            break
        at = [cos(size) * p + sin(size) / size * s for p, s in zip(at, step, strict=True)]
        length = norm_of(g, at)
        at = [p / length for p in at]
    size = sum(wi * x for wi, x in zip(w, norms(g), strict=True))
    return combine(deltas, [size * p for p in at])


def _mean_logarithm(g: Gram, units: Sequence[float], w: Sequence[float], at: Sequence[float]) -> list[float]:
    """Return the coefficients of sum w_i log_at(unit_i), a tangent at ``at``; updates that are zero take no part."""
    total = [0.0] * len(at)
    for i, (unit, wi) in enumerate(zip(units, w, strict=True)):
        if unit == 0:
            continue
        cosine = max(-1.0, min(1.0, product(g, at, [unit if j == i else 0.0 for j in range(len(at))])))
        angle = acos(cosine)
        if angle > 3.14:
            raise NumericsError("two directions are opposite: their mean points nowhere", hint="use linear")
        stretch = angle / sin(angle) if angle > 1e-9 else 1.0
        for j, p in enumerate(at):
            total[j] += wi * stretch * ((unit if j == i else 0.0) - cosine * p)
    return total
