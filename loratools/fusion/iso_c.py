"""Iso-C: one size for all directions of the sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from loratools.core.update import Delta, namespace
from loratools.fusion.base import Between, fusion
from loratools.fusion.canonical import made, supported
from loratools.fusion.combine import zero_of
from loratools.fusion.elements import weighted_sum
from loratools.fusion.frame import frame
from loratools.linalg.dense import thin_svd
from loratools.linalg.factored import SVD


@fusion(
    "iso-c",
    reference="arXiv:2502.04959",
    guarantee="exact on the support of the sum; all its singular values equal",
    identity=None,
)
def iso_c(deltas: Sequence[Delta], weights: Sequence[float], *, scale: Annotated[float, Between(0)] = 1.0) -> Delta:
    """Replace every singular value of the weighted sum by their mean, on its support.

    The published code averages over all min(m, n) values and fills null directions with arbitrary vectors; for a
    low-rank sum that is noise, so only directions that carry content count. One adapter does not give itself.
    """
    found = frame(deltas)
    if found is None:
        return zero_of(deltas)
    left, s, right = isotropic(thin_svd(weighted_sum(found.cores, weights)))
    return made(deltas, found.left @ (left * (scale * s)), right @ found.right)


def isotropic(found: SVD) -> SVD:
    """Return the same vectors with the mean singular value, without null directions."""
    xp = namespace(found.s)
    kept = supported(found)
    return SVD(kept.u, xp.full_like(kept.s, float(xp.mean(kept.s)) if kept.s.shape[0] else 0.0), kept.vh)
