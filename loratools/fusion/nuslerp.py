"""Spherical interpolation by weights, of whole updates or row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loratools.core.update import Array, Delta, namespace
from loratools.fusion.base import fusion
from loratools.fusion.canonical import made
from loratools.fusion.combine import combine, factors_of
from loratools.fusion.scalars import arc, cosine, gram, shares
from loratools.linalg.namespace import up

COLINEAR = 1 - 1e-12
By = Literal["flat", "row", "column"]


@fusion("nuslerp", reference="mergekit, NuSLERP", guarantee="exact; rank is the sum of ranks", most=2)
def nuslerp(deltas: Sequence[Delta], weights: Sequence[float], *, by: By = "flat") -> Delta:
    """Two updates on the arc between them, at the second one's share of the weights; also row by row or by columns.

    ``by`` = row (output channels) or column (input channels) interpolates every one on its own arc: a diagonal on one
    factor, still exact. One adapter is returned times its weight.
    """
    if len(deltas) == 1:
        return combine(deltas, weights)
    t = shares(weights)[1]
    if by == "flat":
        g = gram(deltas)
        return combine(deltas, arc(cosine(g), t, COLINEAR))
    (b1, a1), (b2, a2) = pairs = [factors_of(d) for d in deltas]
    xp = namespace(b1, b2)
    tall, wide = pairs if by == "row" else [(a.mT, b.mT) for b, a in pairs]
    first, second = _arcs(tall, wide, t)
    if by == "row":
        b1, b2 = first[:, None] * b1, second[:, None] * b2
    else:
        a1, a2 = a1 * first, a2 * second
    return made(deltas, xp.concat([b1, b2], axis=1), xp.concat([a1, a2], axis=0))


def _arcs(first: tuple[Array, Array], second: tuple[Array, Array], t: float) -> tuple[Array, Array]:
    """Return the coefficients (m,) of every row of two products of factors (b, a)."""
    (b1, a1), (b2, a2) = ((up(b, "float64"), up(a, "float64")) for b, a in (first, second))
    xp = namespace(b1, b2)
    inner = [
        xp.sum((x @ (a @ c.mT)) * y, axis=1) for x, a, y, c in ((b1, a1, b1, a1), (b2, a2, b2, a2), (b1, a1, b2, a2))
    ]
    size = xp.sqrt(xp.clip(inner[0] * inner[1], 0.0, None))
    cosines = xp.where(size > 0, inner[2] / xp.where(size > 0, size, 1.0), 1.0)
    straight = xp.abs(cosines) > COLINEAR
    angle = xp.acos(xp.where(straight, 0.0, cosines))
    sine = xp.sin(angle)
    return tuple(xp.where(straight, line, xp.sin(line * angle) / sine) for line in (1 - t, t))
