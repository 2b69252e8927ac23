"""The canonical gauge: what a product of factors is, whatever basis training left it in.

Anything element-wise on factors, or on a basis made of them, changes under B -> B G, A -> G^-1 A although the update
does not. So every method that looks inside starts from the thin SVD of the whole product, scale included.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.core.update import Array, Delta, namespace
from loratools.fusion.combine import Zero, dtype_of
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg import factored
from loratools.linalg.dense import thin_svd
from loratools.linalg.factored import SVD
from loratools.linalg.namespace import down, up
from loratools.linalg.orth import orthonormalise

NULL = 1e-6
"""Directions below this share of the largest singular value are rounding, not content."""

PARALLEL = 1e-5
"""Directions of several adapters that agree to this count as one."""


def canonical(d: Delta) -> SVD:
    """Return u (m, k), s (k,) descending, vh (k, n) of an update, in fp64, without its null directions (zero: k = 0).

    Exact: QR of the factors and SVD of their core, O((m + n) r^2); a full SVD where there are no factors.
    """
    low = low_rank(d)
    if low is None:
        found = thin_svd(up(d.matrix(), "float64"))
    else:
        found = factored.svd(up(low.b, "float64"), up(low.a, "float64"), scale=low.scale)
    return supported(found)


def supported(found: SVD) -> SVD:
    """Return the triples that carry content."""
    k = _count(found.s, NULL)
    return SVD(found.u[:, :k], found.s[:k], found.vh[:k, :])


def _count(s: Array, share: float) -> int:
    return int(namespace(s).sum(s > share * s[0])) if float(s[0]) > 0 else 0


def left_singular(x: Array) -> Array:
    """Return the left singular vectors of x (m, c), c >= 1, that carry content: (m, k), descending, fp64."""
    xp = namespace(x)
    wide = up(x, "float64")
    if wide.shape[0] < wide.shape[1]:
        u, s, _ = xp.linalg.svd(wide, full_matrices=False)
        return u[:, : _count(s, NULL)]
    q = orthonormalise(wide)
    u, s, _ = xp.linalg.svd(q.mT @ wide, full_matrices=False)
    return q @ u[:, : _count(s, NULL)]


def polar(x: Array) -> Array:
    """Return the nearest partial isometry to x (m, c): orthonormal columns where those of x are independent.

    By SVD, on the support only: where columns of x coincide (two equal adapters) the isometry maps them together, and
    no arbitrary direction enters. O(m c^2).
    """
    xp = namespace(x)
    wide = up(x, "float64")
    u, s, vh = xp.linalg.svd(wide, full_matrices=False) if wide.shape[0] < wide.shape[1] else _tall_svd(wide)
    k = _count(s, PARALLEL)
    return u[:, :k] @ vh[:k, :]


def _tall_svd(x: Array) -> SVD:
    xp = namespace(x)
    q, r = xp.linalg.qr(x)
    u, s, vh = xp.linalg.svd(r, full_matrices=False)
    return SVD(q @ u, s, vh)


def made(deltas: Sequence[Delta], b: Array, a: Array) -> Delta:
    """Return the low-rank update b a in the shape and working dtype of the inputs; a zero where nothing is left."""
    if 0 in b.shape or 0 in a.shape:
        return Zero(deltas[0].shape, b)
    dtype = dtype_of(deltas)
    return LowRank(down(b, dtype), down(a, dtype), 1.0, deltas[0].shape)
