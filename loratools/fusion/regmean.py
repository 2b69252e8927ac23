"""RegMean: the linear map that answers all tasks' inputs best."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Annotated

from loratools.core.update import Array, Delta, namespace
from loratools.errors import NumericsError, UsageError
from loratools.fusion.base import Between, check_statistics, fusion
from loratools.fusion.canonical import made
from loratools.fusion.combine import Zero, factors_of, zero_of
from loratools.linalg.namespace import cholesky, solve_triangular, up


@fusion(
    "regmean",
    reference="arXiv:2212.09849",
    guarantee="exact least squares on the given statistics; rank is the sum of ranks",
)
def regmean(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    statistics: Sequence[Array],
    alpha: Annotated[float, Between(0, 1)] = 0.9,
) -> Delta:
    """(sum w_i D_i G_i)(sum w_i G_i)^-1 with G_i = X_i^T X_i, the inputs that task i sees at this module.

    Minimises sum w_i |(D - D_i) X_i|^2; weights count relative to each other. ``--stats`` gives one file per adapter:
    per module ``in_gram`` (n, n) or ``in_diag`` (n,). Off-diagonals are multiplied by ``alpha``. Equal
    statistics give the weighted mean. Exact in factors: B = [B_i], A = [w_i A_i G_i](sum w_i G_i)^-1.
    """
    check_statistics(statistics, len(deltas))
    n = deltas[0].matrix_shape[1]
    grams = [_shrunk(g, n, alpha) for g in statistics]
    if len({g.ndim for g in grams}) > 1:
        raise UsageError("statistics of one kind are needed", expected="all (n, n) or all (n,)")
    parts = [(w, g, *factors_of(d)) for d, w, g in zip(deltas, weights, grams, strict=True) if not isinstance(d, Zero)]
    if not parts:
        return zero_of(deltas)
    xp = namespace(*grams)
    total = reduce(add, (w * g for w, g in zip(weights, grams, strict=True)))
    wide = xp.concat([w * (up(a, "float64") * g if g.ndim == 1 else up(a, "float64") @ g) for w, g, _, a in parts])
    tall = namespace(parts[0][2]).concat([b for *_, b, _ in parts], axis=1)
    return made(deltas, tall, _divided(wide, total))


def _shrunk(g: Array, n: int, alpha: float) -> Array:
    """Return the statistics in fp64 with off-diagonals times alpha. Raises UsageError for another shape."""
    if tuple(g.shape) not in ((n,), (n, n)):
        raise UsageError("statistics do not fit the module", expected=f"({n}, {n}) or ({n},)", got=tuple(g.shape))
    g = up(g, "float64")
    if g.ndim == 1:
        return g
    xp = namespace(g)
    return alpha * g + (1 - alpha) * g * xp.eye(n, dtype=g.dtype, device=g.device)


def _divided(wide: Array, total: Array) -> Array:
    """Return wide @ total^-1. Raises NumericsError where total is not positive definite."""
    if total.ndim == 1:
        if not bool((total > 0).all()):
            raise NumericsError("the statistics have an input without activity", hint="add a small constant to them")
        return wide / total
    factor = cholesky(total)
    if factor is None:
        raise NumericsError("the statistics are not positive definite", hint="lower --set alpha")
    halfway = solve_triangular(factor, wide.mT, lower=True)
    return solve_triangular(factor, halfway, lower=True, transpose=True).mT
