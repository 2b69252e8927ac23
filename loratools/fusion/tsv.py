"""TSV-Merge: give every singular vector of every task a direction of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from loratools.core.update import Delta, namespace
from loratools.fusion.base import Between, fusion
from loratools.fusion.canonical import canonical, made, polar
from loratools.fusion.combine import zero_of
from loratools.linalg.factored import SVD


@fusion(
    "tsv",
    reference="arXiv:2412.00081",
    guarantee="exact in factor space; singular values are the inputs' where directions are independent",
)
def tsv(deltas: Sequence[Delta], weights: Sequence[float], *, scale: Annotated[float, Between(0)] = 1.0) -> Delta:
    """Whiten the singular vectors of all updates against each other, keep their singular values.

    polar([U_i]) diag(w_i S_i) polar([V_i])^T. Every adapter keeps all its directions while the sum of ranks fits into
    the matrix, its leading min(m, n) / n otherwise. The polar factors are taken by SVD on their support, so adapters
    that share directions do not blow up. ``scale`` multiplies the result. O((m + n) R^2).
    """
    forms = [canonical(d) for d in deltas]
    if not sum(f.s.shape[0] for f in forms):
        return zero_of(deltas)
    left, s, right = tsv_of(forms, weights)
    return made(deltas, left * (scale * s), right)


def tsv_of(forms: Sequence[SVD], weights: Sequence[float]) -> SVD:
    """Return whitened vectors and weighted values of updates in canonical form (values neither sorted nor positive)."""
    xp = namespace(*(f.s for f in forms))
    smallest = min(forms[0].u.shape[0], forms[0].vh.shape[1])
    fits = sum(f.s.shape[0] for f in forms) <= smallest
    kept = [f.s.shape[0] if fits else min(f.s.shape[0], max(1, smallest // len(forms))) for f in forms]
    left = xp.concat([f.u[:, :k] for f, k in zip(forms, kept, strict=True)], axis=1)
    right = xp.concat([f.vh[:k, :].mT for f, k in zip(forms, kept, strict=True)], axis=1)
    values = xp.concat([w * f.s[:k] for f, k, w in zip(forms, kept, weights, strict=True)])
    return SVD(polar(left), values, polar(right).mT)
