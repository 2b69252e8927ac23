"""Equal say for updates of unequal size."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Delta
from loratools.fusion.base import fusion
from loratools.fusion.combine import combine
from loratools.fusion.scalars import gram, inverses, norms


@fusion("norm-equal", reference="Gram family", guarantee="exact; rank is the sum of ranks")
def norm_equal(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Weighted sum after every update is scaled to the mean norm of them all.

    sum w_i (mean |D| / |D_i|) D_i, per module; updates that are zero neither count nor contribute.
    """
    length = norms(gram(deltas))
    alive = [x for x in length if x > 0]
    mean = sum(alive) / max(len(alive), 1)
    return combine(deltas, [w * mean * inverse for w, inverse in zip(weights, inverses(length), strict=True)])
