"""Hadamard: the element-wise product of two low-rank updates, as LoHa stores it (arXiv:2108.06098)."""

from __future__ import annotations

from typing import Self

from loratools.core import generic
from loratools.core.generic import need_delta, transposed
from loratools.core.routes import route
from loratools.core.update import Array, Delta, Update, kind
from loratools.errors import FormatError
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg.factored import SVD
from loratools.linalg.namespace import namespace, working_dtype


@kind("hadamard")
class Hadamard(Delta):
    """D = scale * left o right, of equal shapes; its rank is at most the product of their ranks."""

    left: Delta
    right: Delta
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.left.shape != self.right.shape:
            raise FormatError("the halves of a product differ", expected=self.left.shape, got=self.right.shape)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return self.left.shape

    def dense(self) -> Array:
        """Return scale * left o right; O(m n (r1 + r2))."""
        return self.scale * (self.left.dense() * self.right.dense())

    def matmul(self, x: Array) -> Array:
        """Return D x; O((m + n) r1 r2 k) through the Khatri-Rao factors."""
        return self._operator().matmul(x)

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y; O((m + n) r1 r2 k) through the Khatri-Rao factors."""
        return self._operator().rmatmul(y)

    def _operator(self) -> Delta:
        return low_rank(self) or Dense(self.dense())

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 7 product of ranks 3 and 3, scaled by 2."""
        return cls(LowRank.example(seed), LowRank.example(seed + 1), 0.5)


@low_rank.register(Hadamard)
def _(u: Hadamard) -> LowRank | None:
    left, right = low_rank(u.left), low_rank(u.right)
    return None if left is None or right is None else khatri_rao(left, right, u.scale)


def khatri_rao(left: LowRank, right: LowRank, scale: float) -> LowRank:
    """Return scale * left o right exactly: row-wise Kronecker products of the factors, rank r1 r2."""
    dtype = working_dtype(left.b, left.a, right.b, right.a)
    (b1, a1), (b2, a2) = left.factors(dtype), right.factors(dtype)
    b = (b1[:, :, None] * b2[:, None, :]).reshape(b1.shape[0], -1)
    a = (a1[:, None, :] * a2[None, :, :]).reshape(-1, a1.shape[1])
    return LowRank(b, a, scale * left.scale * right.scale, left.shape)


@generic.transposed.register(Hadamard)
def _(u: Hadamard) -> Hadamard:
    return Hadamard(need_delta(transposed(u.left)), need_delta(transposed(u.right)), u.scale)


@generic.svd.register(Hadamard)
def _(u: Hadamard, k: int, *, seed: int = 0) -> SVD:
    flat = low_rank(u)
    return generic.svd(Dense(u.dense()) if flat is None else flat, k, seed=seed)


@generic.inner.register(Hadamard)
def _(u: Hadamard, v: Delta) -> float:
    flat = low_rank(u)
    return generic.inner(Dense(u.dense()) if flat is None else flat, v)


@route(Hadamard, LowRank, cost=5.0)
def _product_of_ranks(u: Hadamard) -> Update:
    return khatri_rao(_factored(u.left), _factored(u.right), u.scale)


@route(Hadamard, Dense, cost=10.0)
def _form(u: Hadamard) -> Update:
    return Dense(u.dense())


def _factored(u: Delta) -> LowRank:
    """Return a half as factors, a dense one through an identity."""
    return low_rank(u) or thin(u)


def thin(u: Delta) -> LowRank:
    """Return any delta as an exact product with an identity: rank min(m, n)."""
    d = u.dense()
    m, n = u.matrix_shape
    d = d.reshape(m, n)
    eye = namespace(d).eye(min(m, n), dtype=d.dtype)
    return LowRank(eye, d, 1.0, u.shape) if m <= n else LowRank(d, eye, 1.0, u.shape)
