"""TIES on the true update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from loratools.core.update import Delta
from loratools.fusion.base import Between, Density, fusion
from loratools.fusion.combine import zero_of
from loratools.fusion.elements import Sign, elected, trim
from loratools.fusion.tiles import alive, reader, tiled
from loratools.fusion.trimming import cuts


@fusion(
    "ties",
    reference="arXiv:2306.01708",
    guarantee="exact on the true update, tile by tile; then truncated (the report says what that cost)",
    identity={"density": 1.0},
)
def ties(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    density: Density = 0.2,
    sign: Sign = "total",
    scale: Annotated[float, Between(0)] = 1.0,
) -> Delta:
    """Trim each update to its largest entries, elect a sign per entry, average those that agree with it.

    Trimming is per module and adapter, exact. The sign is elected on the weighted entries by their sum (``total``) or
    by count (``frequency``); the mean divides by how many agree. ``scale`` multiplies the result (lambda).
    """
    parts, w = alive(deltas, weights)
    if not parts:
        return zero_of(deltas)
    readers = [reader(d) for d in parts]
    limits = cuts(readers, parts[0].matrix_shape, density)
    return tiled(
        parts, readers, lambda xs, _: scale * elected([trim(x, t) for x, t in zip(xs, limits, strict=True)], w, sign)
    )
