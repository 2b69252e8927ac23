"""Thresholds of trimming: the smallest magnitudes that stay, exact, per module and adapter."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.fusion.elements import count_of
from loratools.fusion.tiles import Rows, kth_largest


def cuts(readers: Sequence[Rows], shape: tuple[int, int], density: float) -> list[float]:
    """Return for every update the magnitude from which its entries stay (0: all do)."""
    if density >= 1:
        return [0.0] * len(readers)
    k = count_of(shape[0] * shape[1], density)
    return [kth_largest(rows, shape, k) for rows in readers]
