"""Model Stock: shrink the mean by how well the updates agree."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Delta
from loratools.fusion.base import fusion
from loratools.fusion.combine import combine
from loratools.fusion.scalars import gram, inverses, norms, shares


@fusion("model-stock", reference="arXiv:2403.19522", guarantee="exact; rank is the sum of ranks")
def model_stock(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Mean of the updates times t = N c / (1 + (N - 1) c), c their mean pairwise cosine.

    Agreement (c = 1) keeps the mean, independence (c = 0) gives zero: it is meant for several runs of one task. A
    negative c counts as 0. The mean is weighted by shares; one adapter has nobody to disagree with, and is kept.
    """
    g, count = gram(deltas), len(deltas)
    units = inverses(norms(g))
    cosines = [g[i][j] * units[i] * units[j] for i in range(count) for j in range(i)]
    c = max(0.0, min(1.0, sum(cosines) / len(cosines))) if cosines else 1.0
    t = count * c / (1 + (count - 1) * c)
    return combine(deltas, [t * w for w in shares(weights)])
