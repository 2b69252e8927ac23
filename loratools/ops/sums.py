"""What is left of an update when a part of it is taken off."""

from __future__ import annotations

from loratools.core.update import Delta
from loratools.kinds.lowrank import LowRank, concatenate, low_rank
from loratools.kinds.sum import Sum


def minus(whole: Delta, part: LowRank) -> Delta:
    """Return whole - part: of low rank where the whole is, else a sum."""
    flat = low_rank(whole)
    negative = LowRank(part.b, part.a, -part.scale, part.shape)
    return Sum((whole, negative)) if flat is None else concatenate((flat, negative))
