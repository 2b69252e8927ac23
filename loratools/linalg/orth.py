"""Orthonormal bases of tall matrices, batched by leading dimensions."""

from __future__ import annotations

from loratools.leaf import Array
from loratools.linalg.gram import cross
from loratools.linalg.namespace import cholesky, down, namespace, solve_triangular, up, working_dtype


def orthonormalise(y: Array) -> Array:
    """Return an orthonormal basis of the columns of ``y``: y (..., m, c), m >= c -> q (..., m, c), q^T q = I.

    CholeskyQR2 in fp64: two rounds of Gram matrix, Cholesky factor, triangular solve; where the first round is not
    nearly orthonormal (condition beyond about 1e7, dependent columns), Householder QR instead. So q is orthonormal to a
    few c eps of its dtype, and spans y wherever y has full rank. Cost 4 m c^2 multiply-adds, all in BLAS 3. Comes back
    in fp32 (fp64 for fp64). Source: Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm", 2015.
    """
    wide = up(y, "float64")
    q = _cholesky_qr2(wide)
    if q is None:
        q = namespace(y).linalg.qr(wide)[0]
    return down(q, working_dtype(y))


def orthonormalise_against(basis: Array, y: Array) -> Array:
    """Return orthonormal columns that span ``y`` beyond ``basis``: basis (..., m, b), y (..., m, c) -> (..., m, c).

    [basis, result] is orthonormal if basis is and m >= b + c; directions of y inside the basis are replaced by others.
    Block Gram-Schmidt, twice. Cost 4 m c (b + c) multiply-adds.
    """
    xp = namespace(basis, y)
    q = y
    for _ in range(2):
        q = orthonormalise(q - basis @ (xp.matrix_transpose(basis) @ q))
    return q


def _cholesky_qr2(y: Array) -> Array | None:
    """Return the orthonormal factor of fp64 ``y``, or None where the first round fails."""
    first = _cholesky_qr(y, cross(y, y, "float64"))
    if first is None:
        return None
    xp = namespace(y)
    gram = cross(first, first, "float64")
    if float(xp.max(xp.abs(gram - xp.eye(y.shape[-1], dtype=y.dtype, device=y.device)))) > 1e-2 / y.shape[-1]:
        return None
    return _cholesky_qr(first, gram)


def _cholesky_qr(y: Array, gram: Array) -> Array | None:
    """Return ``y L^-T`` for gram = L L^T, or None where gram is not positive definite."""
    factor = cholesky(gram)
    if factor is None:
        return None
    xp = namespace(y)
    unit = xp.broadcast_to(xp.eye(gram.shape[-1], dtype=y.dtype, device=y.device), gram.shape)
    return y @ xp.matrix_transpose(solve_triangular(factor, unit, lower=True))
