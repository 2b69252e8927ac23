"""Core Space: merge R x R cores instead of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loratools.core.update import Array, Delta
from loratools.fusion.base import Density, fusion
from loratools.fusion.canonical import made, supported
from loratools.fusion.combine import zero_of
from loratools.fusion.content import content_key
from loratools.fusion.elements import merged, weighted_sum
from loratools.fusion.frame import frame
from loratools.fusion.iso_c import isotropic
from loratools.fusion.tsv import tsv_of
from loratools.linalg.dense import thin_svd

CoreRule = Literal["ties", "dare", "tsv", "iso", "sum"]


@fusion(
    "core",
    reference="arXiv:2509.17786",
    guarantee="lossless frame on canonical adapters, no dense update; rank at most the sum of ranks",
    identity={"density": 1.0},
    linear_limit={"rule": "sum"},
)
def core(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    rule: CoreRule = "ties",
    density: Density = 0.2,
    seed: int = 0,
) -> Delta:
    """Merge the R x R cores U_B^T D_i V_A of the joint frame by a rule: ties, dare, tsv, iso or sum.

    The frame is made of canonical factors; on raw ones an element-wise rule moves by 70 % when the gauge does.
    ``density`` belongs to ties and dare. With rule iso one adapter does not give itself.
    """
    found = frame(deltas)
    if found is None:
        return zero_of(deltas)
    keys = [content_key(d, seed) for d in deltas] if rule == "dare" else [(0, 0)] * len(deltas)
    return made(deltas, found.left @ _merged(rule, found.cores, weights, density, keys), found.right)


def _merged(
    rule: CoreRule, cores: Sequence[Array], weights: Sequence[float], density: float, keys: Sequence[tuple[int, int]]
) -> Array:
    if rule == "tsv":
        left, s, right = tsv_of([supported(thin_svd(c)) for c in cores], weights)
        return (left * s) @ right
    if rule == "iso":
        left, s, right = isotropic(thin_svd(weighted_sum(cores, weights)))
        return (left * s) @ right
    return merged(rule, cores, weights, density, keys)
