"""Coded: what low-rank updates in few bits share; their factors are unpacked when they are used."""

from __future__ import annotations

from abc import abstractmethod

from loratools.core import generic
from loratools.core.rows import Rows, rowwise
from loratools.core.update import Array, Delta
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg.factored import SVD


class Coded(Delta):
    """A product of two factors that are stored as codes: everything but unpacking is the product's business.

    No kind of its own: each layout of the codes is one.
    """

    @abstractmethod
    def unpacked(self, dtype: str = "float32") -> LowRank:
        """Return the factors as leaves that unpack when read: fp32 values, rounded once to a narrower ``dtype``."""

    def matmul(self, x: Array) -> Array:
        """Return s * b (a x); O((m + n) r k) beside unpacking."""
        return self.unpacked().matmul(x)

    def rmatmul(self, y: Array) -> Array:
        """Return s * a^T (b^T y); O((m + n) r k) beside unpacking."""
        return self.unpacked().rmatmul(y)

    def dense(self) -> Array:
        """Return D in ``shape``."""
        return self.unpacked().dense()


def unpacked(u: Coded) -> LowRank:
    """Return the factors: the way of every coded kind to low rank, exact."""
    return u.unpacked()


low_rank.register(Coded)(unpacked)


@generic.svd.register(Coded)
def _(u: Coded, k: int, *, seed: int = 0) -> SVD:
    return generic.svd(u.unpacked(), k, seed=seed)


@generic.svdvals.register(Coded)
def _(u: Coded) -> Array:
    return generic.svdvals(u.unpacked())


@generic.inner.register(Coded)
def _(u: Coded, v: Delta) -> float:
    return generic.inner(u.unpacked(), v)


@rowwise.register(Coded)
def _(u: Coded) -> Rows | None:
    return rowwise(u.unpacked())
