"""Element-wise rules on lists of equally shaped arrays: the same for tiles of true updates and for coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod
from operator import add
from typing import Literal

from loratools.core.update import Array, namespace
from loratools.linalg.namespace import topk_threshold, up, working_dtype
from loratools.linalg.seeds import Key, uniform

Sign = Literal["total", "frequency"]
Rule = Literal["sum", "ties", "dare-ties", "magnitude", "dare"]


def count_of(size: int, density: float) -> int:
    """Return how many of ``size`` entries a density keeps, at least one."""
    return max(1, int(density * size))


def trim(x: Array, threshold: float) -> Array:
    """Return x with every entry below the threshold in magnitude set to zero."""
    xp = namespace(x)
    return x if threshold <= 0 else xp.where(xp.abs(x) >= threshold, x, 0.0)


def trimmed(x: Array, density: float) -> Array:
    """Return x with only its largest entries, a share ``density`` of them (and those equal to the last)."""
    return x if density >= 1 else trim(x, float(topk_threshold(x, count_of(prod(x.shape), density))))


def dropped(x: Array, density: float, key: Key, rows: range | None = None) -> Array:
    """Return x with entries kept at random with probability ``density`` and divided by it: x in expectation.

    The word of an entry depends on key, row and column alone; ``rows`` are those of the whole that x holds.
    """
    if density >= 1:
        return x
    keep = uniform(key, rows or x.shape[0], x.shape[1], like=x) < density
    return namespace(x).where(keep, x / density, 0.0)


def weighted_sum(parts: Sequence[Array], weights: Sequence[float]) -> Array:
    """Return sum w_i x_i."""
    return reduce(add, (x if w == 1 else w * x for x, w in zip(parts, weights, strict=True)))


def elected(parts: Sequence[Array], weights: Sequence[float], sign: Sign = "total") -> Array:
    """Return, entry by entry, the mean of those w_i x_i that have the elected sign (TIES: elect, then disjoint mean).

    Elected is the sign of the sum of all w_i x_i (``total``), or of their signs (``frequency``); zero counts as plus.
    Entries that are zero have no vote and do not count in the mean.
    """
    xp = namespace(*parts)
    weighted = [x if w == 1 else w * x for x, w in zip(parts, weights, strict=True)]
    votes = weighted if sign == "total" else [xp.sign(x) for x in weighted]
    positive = reduce(add, votes) >= 0
    agree = [xp.where(positive, x > 0, x < 0) for x in weighted]
    total = reduce(add, (xp.where(yes, x, 0.0) for x, yes in zip(weighted, agree, strict=True)))
    counts = reduce(add, (up(yes, working_dtype(total)) for yes in agree))
    return total / xp.where(counts > 0, counts, 1.0)


def agreed(parts: Sequence[Array], weights: Sequence[float]) -> Array:
    """Return, entry by entry, the sum of those w_i x_i that have the sign of the whole sum; 0 where that is 0."""
    xp = namespace(*parts)
    weighted = [x if w == 1 else w * x for x, w in zip(parts, weights, strict=True)]
    sign = xp.sign(reduce(add, weighted))
    return reduce(add, (xp.where(x * sign > 0, x, 0.0) for x in weighted))


def merged(rule: Rule, parts: Sequence[Array], weights: Sequence[float], density: float, keys: Sequence[Key]) -> Array:
    """Return coordinates merged by one of the rules; ``keys`` are the random streams of the parts."""
    if rule.startswith("dare"):
        parts = [dropped(x, density, key) for x, key in zip(parts, keys, strict=True)]
    elif rule != "sum":
        parts = [trimmed(x, density) for x in parts]
    return elected(parts, weights) if rule.endswith("ties") else weighted_sum(parts, weights)
