"""Kronecker: D = scale * p (x) q, as LoKr stores it (arXiv:2309.14859)."""

from __future__ import annotations

from typing import Self

from loratools.core import generic
from loratools.core.generic import need_delta, transposed
from loratools.core.routes import route
from loratools.core.update import Array, Delta, Update, kind
from loratools.errors import FormatError
from loratools.kinds.dense import Dense
from loratools.kinds.hadamard import thin
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg.factored import SVD
from loratools.linalg.namespace import namespace, up, working_dtype


@kind("kronecker")
class Kronecker(Delta):
    """D = scale * kron(p, q); p (o1, i1), q (o2, i2) or a convolution's (o2, i2, kh, kw)."""

    p: Delta
    q: Delta
    scale: float = 1.0

    def __post_init__(self) -> None:
        if len(self.p.shape) != 2 or len(self.q.shape) < 2:
            raise FormatError("factors of a Kronecker product are matrices", got=f"{self.p.shape}, {self.q.shape}")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter: (o1 o2, i1 i2, ...)."""
        p, q = self.p.shape, self.q.shape
        return p[0] * q[0], p[1] * q[1], *q[2:]

    def dense(self) -> Array:
        """Return scale * kron(p, q) in ``shape``; O(m n)."""
        p, q = self.p.dense(), self.q.dense()
        return (self.scale * kron(p, q.reshape(q.shape[0], -1))).reshape(self.shape)

    def matmul(self, x: Array) -> Array:
        """Return D x without forming D: q on the inner index, then p on the outer one."""
        return self.scale * _apply(x, self.q.matmul, self.p.matmul, self.q.matrix_shape[1])

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y without forming D."""
        return self.scale * _apply(y, self.q.rmatmul, self.p.rmatmul, self.q.matrix_shape[0])

    @classmethod
    def example(cls, seed: int) -> Self:
        """A full 2 x 3 matrix times a 5 x 7 update of rank 3, scaled by 2."""
        first: Array = Dense.example(seed).d
        return cls(Dense(first[:2, :3]), LowRank.example(seed), 0.5)


def kron(p: Array, q: Array) -> Array:
    """Return the Kronecker product of two matrices, (o1 o2, i1 i2)."""
    (o1, i1), (o2, i2) = p.shape, q.shape
    return (p[:, None, :, None] * q[None, :, None, :]).reshape(o1 * o2, i1 * i2)


def _apply(x: Array, inner: object, outer: object, width: int) -> Array:
    """Return the product with x ((outer, inner), k): both indices in turn."""
    x = up(x, working_dtype(x))
    k = x.shape[1]
    xp = namespace(x)
    blocks = x.reshape(-1, width, k)
    first = inner(xp.permute_dims(blocks, (1, 0, 2)).reshape(width, -1))  # type: ignore[operator]
    turned = xp.permute_dims(first.reshape(first.shape[0], -1, k), (1, 0, 2))
    second = outer(turned.reshape(turned.shape[0], -1))  # type: ignore[operator]
    return second.reshape(-1, k)


@low_rank.register(Kronecker)
def _(u: Kronecker) -> LowRank | None:
    """A low-rank view where the large factor has one; a full pair has none that is smaller than itself."""
    return None if low_rank(u.q) is None else _factors(u)


def _factors(u: Kronecker) -> LowRank:
    """Return the exact product of factors: b = kron(b1, b2), a = kron(a1, a2), rank r1 r2."""
    p, q = low_rank(u.p) or thin(u.p), low_rank(u.q) or thin(u.q)
    dtype = working_dtype(p.b, p.a, q.b, q.a)
    (b1, a1), (b2, a2) = p.factors(dtype), q.factors(dtype)
    return LowRank(kron(b1, b2), kron(a1, a2), u.scale * p.scale * q.scale, u.shape)


@generic.transposed.register(Kronecker)
def _(u: Kronecker) -> Kronecker:
    return Kronecker(need_delta(transposed(u.p)), need_delta(transposed(u.q)), u.scale)


@generic.svd.register(Kronecker)
def _(u: Kronecker, k: int, *, seed: int = 0) -> SVD:
    flat = low_rank(u)
    return generic.svd(flat, k, seed=seed) if flat is not None else generic.svd.dispatch(Update)(u, k, seed=seed)


@generic.svdvals.register(Kronecker)
def _(u: Kronecker) -> Array:
    """All products of singular values of the two factors."""
    s, t = generic.svdvals(u.p), generic.svdvals(u.q)
    every = (abs(u.scale) * s[:, None] * t[None, :]).reshape(-1)
    return -namespace(every).sort(-every)


@route(Kronecker, LowRank, cost=6.0)
def _product_of_ranks(u: Kronecker) -> Update:
    return _factors(u)


@route(Kronecker, Dense, cost=10.0)
def _form(u: Kronecker) -> Update:
    return Dense(u.dense())
