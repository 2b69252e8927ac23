"""How an adapter fares at every smaller rank: its leading channels as they are, against the best choice.

For nested adapters (DyLoRA, Matryoshka), whose leading channels are meant to be used alone. The curve is 1 - error,
error = |D - D_r| / |D| at unchanged scale; its area (AURAC) is one number for all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log2, sqrt
from typing import Any

from loratools.linalg.channels import Channels, prefix_errors


def rank_curve(found: Channels) -> dict[str, Any]:
    """Return ``ranks`` 1 .. R, ``prefix_error`` and ``optimal_error`` per rank, and both areas of each curve.

    ``aurac`` weighs every rank equally, ``aurac_log2`` every doubling; of 1 - prefix_error, and ``_optimal`` of
    1 - optimal_error. No slice of that rank has a smaller error than the optimal one.
    """
    prefix = prefix_errors(found)[1:]
    optimal = _tails([float(x) for x in found.s], len(prefix))
    return _with_areas(list(range(1, len(prefix) + 1)), prefix, optimal)


def _with_areas(ranks: Sequence[int], prefix: Sequence[float], optimal: Sequence[float]) -> dict[str, Any]:
    return {
        "ranks": list(ranks),
        "prefix_error": list(prefix),
        "optimal_error": list(optimal),
        "aurac": area(ranks, [1 - e for e in prefix]),
        "aurac_log2": area([log2(r) for r in ranks], [1 - e for e in prefix]),
        "aurac_optimal": area(ranks, [1 - e for e in optimal]),
        "aurac_log2_optimal": area([log2(r) for r in ranks], [1 - e for e in optimal]),
    }


def joined_curve(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the curve of a whole adapter out of those of its matrices; None where there is none.

    Squared errors add; a matrix of fewer channels is whole at the ranks beyond its own.
    """
    curved = [row for row in rows if row.get("prefix_error")]
    count = max((len(row["prefix_error"]) for row in curved), default=0)
    whole = sum(row["frobenius_norm"] ** 2 for row in curved)
    if not whole:
        return None
    curves = {
        name: [_joined(curved, name, r, whole) for r in range(count)] for name in ("prefix_error", "optimal_error")
    }
    return _with_areas(list(range(1, count + 1)), curves["prefix_error"], curves["optimal_error"])


def _joined(rows: Sequence[Mapping[str, Any]], name: str, at: int, whole: float) -> float:
    there = (row for row in rows if at < len(row[name]))
    return sqrt(sum((row[name][at] * row["frobenius_norm"]) ** 2 for row in there) / whole)


def area(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the mean height of a curve by the trapezoidal rule; a single point is its own height."""
    if len(x) == 1:
        return y[0]
    steps = zip(x, x[1:], y, y[1:], strict=False)
    return sum((right - left) * (low + high) / 2 for left, right, low, high in steps) / (x[-1] - x[0])


def _tails(s: Sequence[float], count: int) -> list[float]:
    """Return the relative error of the best approximation of rank 1 .. count."""
    padded = [*s, *[0.0] * (count - len(s))]
    total = sum(x * x for x in padded)
    if not total:
        return [0.0] * count
    beyond, errors = 0.0, [0.0]
    for x in reversed(padded[1:]):
        beyond += x * x
        errors.append(sqrt(beyond / total))
    return errors[::-1]
