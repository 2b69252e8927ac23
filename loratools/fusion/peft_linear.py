"""PEFT's ``linear``."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Delta
from loratools.fusion.base import fusion
from loratools.fusion.elements import weighted_sum
from loratools.fusion.peft_factors import merged_factors


@fusion(
    "peft-linear",
    reference="PEFT add_weighted_adapter, combination_type=linear",
    guarantee="equals PEFT; not the sum of updates (cross terms B_i A_j), changes with the gauge; equal ranks",
    gauge_free=False,
)
def peft_linear(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """(sum sqrt(|w_i s_i|) B_i)(sum sign sqrt(|w_i s_i|) A_i), as PEFT does; ``linear`` is the true sum."""
    return merged_factors(deltas, weights, lambda xs, ws, _: weighted_sum(xs, ws))
