"""Iso-CTS: the common subspace, then what every task has beyond it, all at one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from loratools.core.update import Array, Delta, namespace
from loratools.fusion.base import Between, fusion
from loratools.fusion.canonical import made, polar, supported
from loratools.fusion.combine import zero_of
from loratools.fusion.elements import weighted_sum
from loratools.fusion.frame import frame
from loratools.linalg.dense import thin_svd
from loratools.linalg.factored import SVD


@fusion(
    "iso-cts",
    reference="arXiv:2502.04959",
    guarantee="exact on the joint support; all singular values equal where directions are independent",
    identity=None,
)
def iso_cts(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    common: Annotated[float, Between(0, 1)] = 0.8,
    scale: Annotated[float, Between(0)] = 1.0,
) -> Delta:
    """Keep the leading directions of the sum, add each task's own beyond them, whiten, give all the mean value.

    ``common`` is the share of the support that the sum fills; the rest is divided evenly among the tasks, from the
    residual D_i - U_c U_c^T D_i. Everything happens in the R x R core frame. One adapter does not give itself.
    """
    found = frame(deltas)
    if found is None:
        return zero_of(deltas)
    parts = [w * c for c, w in zip(found.cores, weights, strict=True)]
    total = supported(thin_svd(weighted_sum(parts, [1.0] * len(parts))))
    support = int(total.s.shape[0])
    if not support:
        return zero_of(deltas)
    own = (support - int(common * support)) // len(parts)
    shared = support - own * len(parts)  # what does not divide evenly stays with the sum
    chosen = [_leading(total, shared), *(_leading(_residual(p, total.u[:, :shared]), own) for p in parts)]
    xp = namespace(total.s)
    left, right = xp.concat([f.u for f in chosen], axis=1), xp.concat([f.vh.mT for f in chosen], axis=1)
    mean = float(xp.mean(xp.concat([f.s for f in chosen])))
    return made(deltas, found.left @ (polar(left) * (scale * mean)), polar(right).mT @ found.right)


def _residual(core: Array, basis: Array) -> SVD:
    return thin_svd(core - basis @ (basis.mT @ core))


def _leading(found: SVD, k: int) -> SVD:
    return SVD(found.u[:, :k], found.s[:k], found.vh[:k, :])
