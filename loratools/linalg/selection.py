"""The k largest of many scores that pass by in tiles: a histogram first, then a gathering with an exact count.

Non-negative fp32 numbers order as their bit patterns, so the upper half of the bits is a histogram's bin: 2^15 bins,
each at most 1/128 wide (relative). Ties are settled by order of arrival, so results do not depend on tiles or threads.
"""

from __future__ import annotations

from loratools.errors import NumericsError, UsageError
from loratools.leaf import Array
from loratools.linalg.namespace import all_finite, cast, device_of, namespace, scatter_add, topk_threshold, up

BINS = 1 << 15


def bins(scores: Array) -> Array:
    """Return the bin of every score, int64; scores are fp32, not negative. NumericsError where one is not finite."""
    if not all_finite(scores):
        raise NumericsError("an entry is not finite")
    xp = namespace(scores)
    return cast(up(scores).view(xp.int32) >> 16, "int64")


def histogram(places: Array) -> Array:
    """Return how many scores fall in each bin, fp64 (exact) (BINS,); ``places`` are the :func:`bins` of a tile."""
    xp = namespace(places)
    flat = places.reshape(-1)
    return scatter_add(BINS, flat, xp.ones(flat.shape, dtype=xp.float64, device=device_of(flat)))


def boundary(counts: Array, k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th largest score, and how many scores lie in the bins above it.

    Raises UsageError unless 1 <= k <= the number of scores.
    """
    xp = namespace(counts)
    above = xp.flip(xp.cumulative_sum(xp.flip(counts)))  # of each bin and all higher ones
    if not 1 <= k <= int(above[0]):
        raise UsageError("k lies outside the entries", expected=f"1 to {int(above[0])}", got=k)
    edge = int(xp.sum(above >= k)) - 1
    return edge, int(above[edge] - counts[edge])


def first_largest(scores: Array, k: int) -> Array:
    """Return the positions (ascending, int64) of the k largest of scores (c,); of equal ones the first."""
    xp = namespace(scores)
    if k == 0:
        return xp.zeros(0, dtype=xp.int64, device=device_of(scores))
    least = topk_threshold(scores, k)
    ties = scores == least
    over = scores > least
    room = k - int(xp.sum(over))
    chosen = over | (ties & (xp.cumulative_sum(cast(ties, "int64")) <= room))
    return xp.nonzero(chosen)[0]
