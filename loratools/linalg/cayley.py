"""Rotations from skew-symmetric matrices, as differences from the identity: nothing cancels where they are small."""

from __future__ import annotations

from loratools.leaf import Array
from loratools.linalg.namespace import namespace


def skew(vectors: Array, size: int) -> Array:
    """Return the skew-symmetric matrices with these upper triangles, row by row: (c, s (s - 1) / 2) -> (c, s, s)."""
    xp = namespace(vectors)
    rows, start = [], 0
    for i in range(size):
        stop = start + size - 1 - i
        gap = xp.zeros((vectors.shape[0], i + 1), dtype=vectors.dtype, device=vectors.device)
        rows.append(xp.concat([gap, vectors[:, start:stop]], axis=1))
        start = stop
    upper = xp.stack(rows, axis=1)
    return upper - xp.matrix_transpose(upper)


def cayley(q: Array) -> Array:
    """Return R - 1 = -2 Q (1 + Q)^-1 of R = (1 - Q)(1 + Q)^-1, for skew-symmetric Q (c, s, s); O(c s^3)."""
    xp = namespace(q)
    return -2.0 * xp.linalg.solve(_eye(q) + q, q)  # Q commutes with its inverse shift


def neumann(q: Array, terms: int, *, halved: bool = True) -> Array:
    """Return R - 1 of the truncated series of (1 + Q)(1 - Q)^-1, which turns the other way than :func:`cayley`.

    2 Q + 2 Q^2 + ... + 2 Q^(terms - 1). ``halved``: the last power enters once (never Q itself, and Q^3 already for
    three terms), as PEFT computes it from 0.18 on; before, it entered twice.
    """
    if terms < 2:
        return 0.0 * q
    total, power = 2.0 * q, q
    last = max(terms - 1, 3) if halved and terms > 2 else terms - 1
    for i in range(2, last + 1):
        power = power @ q
        total = total + (1.0 if halved and i == last else 2.0) * power
    return total


def projected(q: Array, eps: float) -> Array:
    """Return every matrix of q (c, s, s) pulled back to Frobenius norm eps / sqrt(c) where it is larger (COFT)."""
    xp = namespace(q)
    limit = eps / q.shape[0] ** 0.5
    norm = xp.sqrt(xp.sum(q * q, axis=(1, 2), keepdims=True))
    return xp.where(norm <= limit, q, limit * q / xp.where(norm > 0, norm, 1.0))


def reflections(u: Array) -> tuple[Array, Array]:
    """Return b (n, r), a (r, n) with b a = H_1 ... H_r - 1, H_j the reflection along column j of u (n, r).

    The compact WY form: with unit columns b = -U T^-1, a = U^T, T = 1/2 + the strict upper triangle of U^T U
    (Schreiber, Van Loan 1989). Cost O(n r^2).
    """
    xp = namespace(u)
    unit = u / xp.sqrt(xp.sum(u * u, axis=0, keepdims=True))
    t = xp.triu(unit.T @ unit, k=1) + 0.5 * xp.eye(u.shape[1], dtype=u.dtype, device=u.device)
    return -xp.linalg.solve(t.T, unit.T).T, unit.T


def _eye(q: Array) -> Array:
    return namespace(q).eye(q.shape[-1], dtype=q.dtype, device=q.device)
