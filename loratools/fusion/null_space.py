"""NP-LoRA: project adapters onto the null space of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from loratools.core.update import Delta, namespace
from loratools.fusion.base import Between, fusion
from loratools.fusion.canonical import canonical, made
from loratools.fusion.combine import zero_of


@fusion(
    "null-space",
    reference="arXiv:2511.11051",
    guarantee="exact in factor space; at strength 1 the others do nothing on the inputs that the first reacts to most",
    ordered=True,
)
def null_space(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    keep: Annotated[int, Between(1)] | None = None,
    strength: Annotated[float, Between(0, 1)] = 1.0,
) -> Delta:
    """Keep the first adapter; project the others off its leading input directions: A (I - mu V_k V_k^T).

    ``keep`` is k (all directions unless given), ``strength`` is mu: 0 is the plain sum, 1 the hard projection.
    """
    forms = [canonical(d) for d in deltas]
    xp = namespace(*(f.s for f in forms))
    first = forms[0].vh[:keep, :]
    wide = [f.vh if i == 0 else f.vh - strength * (f.vh @ first.mT) @ first for i, f in enumerate(forms)]
    b = xp.concat([w * f.u * f.s for w, f in zip(weights, forms, strict=True)], axis=1)
    return made(deltas, b, xp.concat(wide, axis=0)) if b.shape[1] else zero_of(deltas)
