"""Norms of operators that are known by their products only, and the error of a decomposition measured afterwards."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

from loratools.errors import UsageError
from loratools.leaf import Array
from loratools.linalg.factored import SVD
from loratools.linalg.namespace import namespace, up, working_dtype
from loratools.linalg.orth import orthonormalise, orthonormalise_against
from loratools.linalg.rsvd import Operator, operator, sketch
from loratools.linalg.seeds import Key

BLOCK = 256
"""Columns looked at at a time."""


class ErrorEstimate(NamedTuple):
    """Measured |D - U S Vh|_F: the ``estimate``, and a ``bound`` that is exceeded with probability <= ``failure``."""

    estimate: float
    bound: float
    failure: float


def frobenius(op: Operator | Array) -> float:
    """Return the Frobenius norm of op (m, n), exact up to rounding.

    Cost min(m, n) products (all unit vectors of the smaller side), ``BLOCK`` at a time, summed in fp64.
    """
    op = operator(op)
    m, n = op.shape
    product, size = (op.matmul, n) if n <= m else (op.rmatmul, m)
    like = _like(op)
    xp = namespace(like)
    total = 0.0
    for start in range(0, size, BLOCK):
        unit = xp.eye(size, min(BLOCK, size - start), k=-start, dtype=like.dtype, device=like.device)
        total += float(xp.sum(up(product(unit), "float64") ** 2))
    return sqrt(total)


def spectral_norm(op: Operator | Array, key: Key, *, steps: int = 12, block: int = 4) -> float:
    """Return the largest singular value of op (m, n) by block Lanczos with full reorthogonalisation.

    Always a lower bound (up to rounding), exact once steps * block reaches min(m, n). From one uniformly random vector
    sigma_1^2 has an expected relative error of at most 0.103 (log(n (steps - 1)^4) / (steps - 1))^2, whatever the
    spectrum. Cost 2 ``steps`` products with ``block`` columns. Source: Kuczynski, Wozniakowski 1992.
    """
    op = operator(op)
    width = min(block, *op.shape)
    q = orthonormalise(op.matmul(sketch(op, width, key)))
    basis, seen = q, op.rmatmul(q)
    xp = namespace(q)
    for done in range(width, min(steps * width, *op.shape), width):
        q = orthonormalise_against(basis, op.matmul(seen[:, -width:])[:, : min(op.shape) - done])
        basis, seen = xp.concat([basis, q], axis=1), xp.concat([seen, op.rmatmul(q)], axis=1)
    return float(xp.linalg.svdvals(up(seen, "float64"))[0])


def residual_error(op: Operator | Array, svd: SVD, *, key: Key, samples: int = 32) -> ErrorEstimate:
    """Measure the Frobenius error of a decomposition of op (m, n) by products with random signs.

    The mean of |(D - U S Vh) w|^2 over signs w is exactly the squared error. ``bound`` = 2 estimate holds with
    probability at least 1 - 0.9^samples, whatever the matrix. Cost one product with ``samples`` columns.

    Derivation: X = |E w|^2 / |E|_F^2 has mean 1 and E X^2 <= 3, hence E exp(-t X) <= 1 - t + 3 t^2 / 2, and by Markov
    P(mean of X <= 1/4) <= (exp(t / 4) (1 - t + 3 t^2 / 2))^samples < 0.9^samples at t = 0.27.
    """
    if samples < 1:
        raise UsageError("at least one sample is needed", got=samples)
    op = operator(op)
    w = sketch(op, samples, key)
    seen = up(op.matmul(w), "float64")
    kept = up(svd.u, "float64") @ (svd.s[:, None] * (up(svd.vh, "float64") @ up(w, "float64")))
    estimate = sqrt(float(namespace(seen).sum((seen - kept) ** 2)) / samples)
    return ErrorEstimate(estimate, 2 * estimate, 0.9**samples)


def _like(op: Operator) -> Array:
    """Return an array in the library and compute dtype, and on the device, of the operator's products."""
    product = op.matmul(sketch(op, 1, (0, 0)))
    return up(product, working_dtype(product))
