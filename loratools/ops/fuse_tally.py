"""The figures of a fusion: sums over modules from which every norm, cosine, share and error follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from math import sqrt
from operator import add
from typing import Any

from loratools.core.update import Array, Delta, namespace
from loratools.errors import NumericsError
from loratools.fusion.scalars import Gram, gram, norm_of
from loratools.kinds.lowrank import LowRank
from loratools.linalg import seeds
from loratools.linalg.gram import cross
from loratools.linalg.namespace import up
from loratools.linalg.rsvd import Matrix as Formed
from loratools.linalg.rsvd import rsvd

UNITS = {
    "inputs": "how many inputs have the module (a missing one is zero)",
    "rank_before": "sum of the inputs' ranks",
    "rank_after": "columns of the factors as written",
    "entries_before": "sum of the entries of sparse inputs, where the result is sparse",
    "entries_after": "entries of a sparse result: the union of the supports",
    "norm_before": "Frobenius norm of the weighted sum of the inputs",
    "norm_after": "Frobenius norm of the fused update",
    "norms": "Frobenius norm of every input",
    "kept": "<fused, input> / |input|^2 of every input: 1 where it is there in full",
    "least_kept": "the smallest of kept",
    "covered": "share of every input's squared norm inside the fused row and column spaces",
    "cosine": "the smallest cosine of two inputs",
    "interference": "the largest pairwise interference: 0 for separate subspaces, 1 for identical ones",
    "from_sum": "|fused - weighted sum| / |weighted sum|",
    "relative_error": "what cutting the rank cost: |written - fused| / |fused|",
}
NEGLIGIBLE = 1e-12
"""Eigenvalues of a Gram matrix below this share of the largest are rounding."""

RESOLUTION = 1e-7
"""Relative distances below this are 0: as a difference of squares in fp64 they are known to its root."""

LEADING = 64
"""Leading directions that stand for an update without factors (a DoRA's) where subspaces are concerned."""

Matrix = list[list[float]]


@dataclass(frozen=True)
class Figures:
    """Sums of one or more modules: ``gram`` of the inputs, ``products`` of the result with each and with itself.

    ``inside[i][j]`` is |P_j D_i P_j|^2 with P_j the projections on j's column and row spaces, the result being the last
    j. ``lost`` and ``whole``: squared error of the cut, and of what was cut.
    """

    gram: Matrix
    products: list[float]
    inside: Matrix
    lost: float
    whole: float

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            _added(self.gram, other.gram),
            [x + y for x, y in zip(self.products, other.products, strict=True)],
            _added(self.inside, other.inside),
            self.lost + other.lost,
            self.whole + other.whole,
        )


def _added(x: Matrix, y: Matrix) -> Matrix:
    return [[a + b for a, b in zip(row, other, strict=True)] for row, other in zip(x, y, strict=True)]


def measured(deltas: Sequence[Delta], result: Delta, lost: float, whole: float) -> Figures:
    """Return the figures of one module; O((m + n) (R + k)^2) where all have factors.

    An update without factors takes part in subspaces by its ``LEADING`` directions; norms and products are exact, by
    one more sweep of tiles.
    """
    items = [*deltas, result]
    pairs = [u if isinstance(u, LowRank) else leading(u) for u in items]
    g, inside = _by_factors(pairs)
    if not all(isinstance(u, LowRank) for u in items):
        g = gram(items)
    n = len(deltas)
    return Figures([row[:n] for row in g[:n]], g[n], inside[:n], lost, whole)


def leading(d: Delta) -> LowRank:
    """Return about the best approximation of rank ``LEADING`` of an update, by a randomised SVD with one power step."""
    x = up(d.matrix())
    found = rsvd(Formed(x), min(LEADING, *x.shape), power=1, key=seeds.key_of(0, "tally"))
    return LowRank(found.u * found.s, found.vh, 1.0, d.shape)


def measured_sum(deltas: Sequence[LowRank], weights: Sequence[float]) -> Figures:
    """Return the figures of the exact sum of updates with weights other than 0: they follow from the inputs' alone."""
    g, inside = _by_factors(deltas)
    products = [sum(w * x for w, x in zip(weights, row, strict=True)) for row in g]
    whole = [[*row, g[i][i]] for i, row in enumerate(inside)]  # every input lies inside the sum's spaces
    return Figures(g, [*products, norm_of(g, weights) ** 2], whole, 0.0, 0.0)


def _by_factors(items: Sequence[LowRank]) -> tuple[Gram, Matrix]:
    """Return all inner products and all |P_j D_i P_j|^2 from the Gram matrices of the stacked factors, in fp64."""
    factors = [u.factors() for u in items]
    gb, ga = _gram_of([b for b, _ in factors]), _gram_of([a.mT for _, a in factors])
    xp = namespace(gb)
    starts = [sum(u.rank for u in items[:i]) for i in range(len(items) + 1)]
    spans = [slice(i, j) for i, j in pairwise(starts)]
    scales = [u.scale for u in items]
    g = [[s * t * float(xp.sum(gb[i, j] * ga[i, j])) for j, t in zip(spans, scales, strict=True)]
         for i, s in zip(spans, scales, strict=True)]  # fmt: skip
    roots = [(inverse_root(gb[j, j]), inverse_root(ga[j, j])) for j in spans]
    inside = [
        [s * s * _square(left.mT @ gb[j, i] @ ga[i, j] @ right) for j, (left, right) in zip(spans, roots, strict=True)]
        for i, s in zip(spans, scales, strict=True)
    ]
    return g, inside


def _gram_of(columns: Sequence[Array]) -> Array:
    stacked = namespace(*columns).concat(list(columns), axis=1)
    return cross(stacked, stacked, "float64")


def inverse_root(g: Array) -> Array:
    """Return w (r, k) with w w^T the pseudo-inverse of g: b w is an orthonormal basis of the columns of b."""
    xp = namespace(g)
    if not bool(xp.all(xp.isfinite(g))):
        raise NumericsError("a factor is not finite", hint="the adapter diverged in training, or is damaged")
    values, vectors = xp.linalg.eigh(g)
    alive = values > NEGLIGIBLE * max(float(values[-1]), 1e-300)
    return vectors[:, alive] / xp.sqrt(values[alive])


def _square(x: Array) -> float:
    return float(namespace(x).sum(x * x))


def summed(figures: Sequence[Figures]) -> Figures:
    """Return the figures of several modules together."""
    return reduce(add, figures)


def said(f: Figures, weights: Sequence[float]) -> dict[str, Any]:
    """Return the figures as the report has them."""
    n = len(f.gram)
    squares = [max(f.gram[i][i], 0.0) for i in range(n)]
    before, after = norm_of(f.gram, weights), sqrt(max(f.products[n], 0.0))
    cosines = [c for i in range(n) for j in range(i) if (c := cosine(f.gram, i, j)) is not None]
    covered = [row[n] / s if s else None for row, s in zip(f.inside, squares, strict=True)]
    disturbed = [x for i in range(n) for j in range(i) if (x := interference(f, i, j)) is not None]
    kept = [f.products[i] / squares[i] if squares[i] else None for i in range(n)]
    away = before**2 - 2 * sum(w * p for w, p in zip(weights, f.products, strict=False)) + after**2
    distance = sqrt(max(away, 0.0)) / before if before else None
    known = [k for k in kept if k is not None]
    return {
        "norm_before": before,
        "norm_after": after,
        "norms": [sqrt(x) for x in squares],
        "kept": kept,
        "least_kept": min(known, default=None),
        "covered": covered,
        "cosine": min(cosines, default=None),
        "interference": max(disturbed, default=None),
        "from_sum": 0.0 if distance is not None and distance < RESOLUTION else distance,
        "relative_error": sqrt(f.lost / f.whole) if f.whole else 0.0,
    }


def cosine(g: Gram, i: int, j: int) -> float | None:
    """Return the cosine of two inputs; None where one is zero."""
    size = sqrt(max(g[i][i], 0.0) * max(g[j][j], 0.0))
    return g[i][j] / size if size else None


def interference(f: Figures, i: int, j: int) -> float | None:
    """Return |(U^T U - 1) S (V^T V - 1)|_F / |S|_F of two inputs' stacked singular vectors; None where both are 0."""
    total = f.gram[i][i] + f.gram[j][j]
    if total <= 0:
        return None
    return sqrt(max(f.inside[i][j] + f.inside[j][i], 0.0) / total)


def pair_rows(f: Figures, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per pair of inputs: cosine and interference over all modules."""
    return [
        {"a": names[j], "b": names[i], "cosine": cosine(f.gram, i, j), "interference": interference(f, i, j)}
        for i in range(len(names))
        for j in range(i)
    ]
