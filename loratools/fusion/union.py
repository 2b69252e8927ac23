"""The union of supports, with signs elected where several updates meet."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Delta
from loratools.fusion.base import fusion
from loratools.fusion.combine import combine, zero_of
from loratools.fusion.elements import agreed
from loratools.fusion.sparse_union import all_sparse, sparse_union
from loratools.fusion.tiles import alive, reader, tiled


@fusion(
    "union",
    reference="arXiv:2306.01708, arXiv:2406.13175",
    guarantee="exact; sparse adapters stay sparse, and disjoint ones give the same bits in any order",
    linear_limit={"elect": False},
)
def union(deltas: Sequence[Delta], weights: Sequence[float], *, elect: bool = True) -> Delta:
    """Add the updates entry by entry; where several meet, only what has the sign of their sum counts.

    Made for sparse adapters (SHiRA): the result lives on the union of their supports. This is the election of TIES,
    without trimming or averaging. ``elect`` = false: the plain sum.
    """
    parts, w = alive(deltas, weights)
    if not parts:
        return zero_of(deltas)
    if not elect:
        return combine(deltas, weights)
    if all_sparse(parts):
        return sparse_union(parts, w, working=True)
    return tiled(parts, [reader(d) for d in parts], lambda xs, _: agreed(xs, w))
