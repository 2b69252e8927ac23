"""The weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Delta
from loratools.fusion.base import fusion
from loratools.fusion.combine import combine


@fusion("linear", reference="exact concatenation", guarantee="exact; rank is the sum of ranks", linear_limit={})
def linear(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Weighted sum of the updates, exactly: factors side by side.

    sum w_i D_i; weights are not normalised. Then ``--rank`` or ``--energy`` truncate optimally. All other methods are
    measured against this one.
    """
    return combine(deltas, weights)
