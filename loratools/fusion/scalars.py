"""One engine for every fusion that is a weighted sum in the end: n scalars from the Gram matrix of the updates.

G_ij = <D_i, D_j> costs O((m + n) r^2) per pair and nothing dense; any ranks, any dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, sin, sqrt

from loratools.core import generic
from loratools.core.update import Delta, namespace
from loratools.errors import NumericsError, UsageError
from loratools.fusion.tiles import ranges, reader
from loratools.kinds.lowrank import low_rank
from loratools.linalg.namespace import up

Gram = list[list[float]]


def gram(deltas: Sequence[Delta]) -> Gram:
    """Return the (n, n) inner products of the updates, in fp64.

    From factors; where one has none (a DoRA's true update, a dense difference), in one sweep of tiles over them all.
    """
    if any(low_rank(d) is None for d in deltas):
        return _by_tiles(deltas)
    upper = [[generic.inner(u, v) for v in deltas[i:]] for i, u in enumerate(deltas)]
    return [[upper[min(i, j)][abs(i - j)] for j in range(len(deltas))] for i in range(len(deltas))]


def _by_tiles(deltas: Sequence[Delta]) -> Gram:
    readers = [reader(d) for d in deltas]
    count = len(deltas)
    total = [[0.0] * count for _ in range(count)]
    for i, j in ranges(deltas[0].matrix_shape):
        flat = [up(read(i, j), "float64").reshape(-1) for read in readers]
        xp = namespace(*flat)
        for row in range(count):
            for column in range(row + 1):
                total[row][column] += float(xp.vecdot(flat[row], flat[column]))
    return [[total[max(i, j)][min(i, j)] for j in range(count)] for i in range(count)]


def norms(g: Gram) -> list[float]:
    """Return the Frobenius norms of the updates."""
    return [sqrt(max(g[i][i], 0.0)) for i in range(len(g))]


def inverses(values: Sequence[float]) -> list[float]:
    """Return 1 / x, and 0 for 0: an update that is zero has no direction and takes no part."""
    return [1 / x if x > 0 else 0.0 for x in values]


def norm_of(g: Gram, c: Sequence[float]) -> float:
    """Return |sum c_i D_i|."""
    return sqrt(max(product(g, c, c), 0.0))


def product(g: Gram, c: Sequence[float], d: Sequence[float]) -> float:
    """Return <sum c_i D_i, sum d_j D_j>."""
    return sum(ci * sum(gij * dj for gij, dj in zip(row, d, strict=True)) for ci, row in zip(c, g, strict=True))


def shares(weights: Sequence[float]) -> list[float]:
    """Return the weights divided by their sum. Raises UsageError where that is zero."""
    total = sum(weights)
    if total == 0:
        raise UsageError("the weights of this method are shares, and their sum is zero", got=list(weights))
    return [w / total for w in weights]


def unit_sum(g: Gram, weights: Sequence[float]) -> list[float]:
    """Return the coefficients of sum w_i D_i / |D_i|, normalised; all 0 where every update is zero.

    Raises NumericsError where directions cancel: their mean points nowhere.
    """
    length = norms(g)
    c = [w * inverse for w, inverse in zip(weights, inverses(length), strict=True)]
    size, terms = norm_of(g, c), sum(abs(ci) * x for ci, x in zip(c, length, strict=True))
    if terms == 0:
        return c
    if size <= 1e-6 * terms:
        raise NumericsError("the directions cancel: their mean points nowhere", hint="use linear, or other weights")
    return [ci / size for ci in c]


def cosine(g: Gram) -> float:
    """Return the cosine of two updates; 1 where one is zero, so that the line between them is straight."""
    size = sqrt(max(g[0][0], 0.0) * max(g[1][1], 0.0))
    return g[0][1] / size if size > 0 else 1.0


def arc(cos: float, t: float, colinear: float) -> tuple[float, float]:
    """Return the two coefficients of spherical interpolation at t; those of the line where |cos| > colinear."""
    if abs(cos) > colinear:
        return 1 - t, t
    angle = acos(max(-1.0, min(1.0, cos)))
    return sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)
