"""Model Breadcrumbs: neither the outliers nor the dust."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from loratools.core.update import Array, Delta, namespace
from loratools.errors import UsageError
from loratools.fusion.base import Between, Density, fusion
from loratools.fusion.combine import zero_of
from loratools.fusion.elements import count_of, trim, weighted_sum
from loratools.fusion.tiles import alive, kth_largest, reader, tiled


@fusion(
    "breadcrumbs",
    reference="arXiv:2312.06795",
    guarantee="exact on the true update, tile by tile; then truncated (the report says what that cost)",
    identity={"density": 1.0, "gamma": 0.0},
    linear_limit={"density": 1.0, "gamma": 0.0},
)
def breadcrumbs(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: Density = 0.9,
    gamma: Annotated[float, Between(0, 1)] = 0.01,
) -> Delta:
    """Drop the largest entries of each update (a share ``gamma``), keep the next ``density``, sum with weights.

    Where the share gamma of a module is less than one entry, none is dropped at the top.
    """
    if density + gamma > 1:
        raise UsageError("density and gamma exceed the whole", expected="density + gamma <= 1", got=density + gamma)
    parts, w = alive(deltas, weights)
    if not parts:
        return zero_of(deltas)
    shape = parts[0].matrix_shape
    size = shape[0] * shape[1]
    top, kept = int(gamma * size), count_of(size, density)
    readers = [reader(d) for d in parts]
    high = [kth_largest(r, shape, top) if top else float("inf") for r in readers]
    low = [kth_largest(r, shape, top + kept) if top + kept < size else 0.0 for r in readers]

    def rule(xs: list[Array], _: range) -> Array:
        kept = (trim(_below(x, h), t) for x, h, t in zip(xs, high, low, strict=True))
        return weighted_sum(list(kept), w)

    return tiled(parts, readers, rule)


def _below(x: Array, high: float) -> Array:
    xp = namespace(x)
    return xp.where(xp.abs(x) < high, x, 0.0)
