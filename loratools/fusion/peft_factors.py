"""How PEFT's ``add_weighted_adapter`` works on factors, quirks included; for parity, never as a default.

B's and A's are merged apart with weights sqrt(|w s|), the sign on A, so every B meets every A: the result is not the
sum of updates, and it changes with the gauge although no update does. All ranks must be equal. One adapter is always
merged linearly, whatever was asked for. Factors of parameters stored (in, out) trade places, and the sign with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import copysign, sqrt

from loratools.core.update import Array, Delta, namespace
from loratools.errors import UnsupportedError, UsageError
from loratools.fusion.combine import zero_of
from loratools.fusion.elements import weighted_sum
from loratools.fusion.tiles import alive
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import topk_threshold

Merge = Callable[[list[Array], list[float], str], Array]
"""Takes one factor of every adapter, their weights, and which factor it is ("a" or "b")."""


def merged_factors(deltas: Sequence[Delta], weights: Sequence[float], merge: Merge) -> Delta:
    """Return the update whose factors are ``merge`` of all b's and of all a's; adapters without the module are skipped.

    Raises UnsupportedError for updates that are not a pair of factors, UsageError for unequal ranks.
    """
    present, w = alive(deltas, weights)
    if not present:
        return zero_of(deltas)
    pairs = [d for d in present if isinstance(d, LowRank)]
    if len(pairs) < len(present):
        raise UnsupportedError("PEFT merges plain LoRA factors only", got=", ".join(sorted({d.kind for d in present})))
    if len({u.rank for u in pairs}) > 1:
        raise UsageError(
            "PEFT merges equal ranks only",
            got=", ".join(str(u.rank) for u in pairs),
            hint="use linear, or squeeze first",
        )
    strengths = [wi * u.scale for wi, u in zip(w, pairs, strict=True)]
    factors = [u.factors() for u in pairs]
    chosen = merge if len(deltas) > 1 else lambda xs, ws, _: weighted_sum(xs, ws)
    b = chosen([b for b, _ in factors], [sqrt(abs(x)) for x in strengths], "b")
    a = chosen([a for _, a in factors], [copysign(sqrt(abs(x)), x) for x in strengths], "a")
    return LowRank(b, a, 1.0, pairs[0].shape)


def elected_unweighted(parts: Sequence[Array], weights: Sequence[float], sign: str) -> Array:
    """Return PEFT's disjoint mean: the sign is elected on unweighted entries, zero counts as plus, divided by count."""
    xp = namespace(*parts)
    signs = [xp.sign(x) for x in parts]
    votes = parts if sign == "total" else signs
    majority = xp.where(sum(votes[1:], votes[0]) >= 0, 1.0, -1.0)
    agree = [xp.where(s == majority, 1.0, 0.0) for s in signs]
    total = weighted_sum([x * yes for x, yes in zip(parts, agree, strict=True)], weights)
    return total / xp.clip(sum(agree[1:], agree[0]), 1.0, None)


def trimmed_factor(x: Array, density: float) -> Array:
    """Return the factor with its largest int(density * size) entries (all at density 1, none where that is 0)."""
    k = int(density * x.shape[0] * x.shape[1])
    xp = namespace(x)
    if k == 0:
        return xp.zeros_like(x)
    return x if density >= 1 else xp.where(xp.abs(x) >= topk_threshold(x, k), x, 0.0)
