"""Stack: one low-rank update per expert of a stacked parameter, all of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import prod
from typing import Self

from loratools.core import generic
from loratools.core.lazy import block_diagonal, widened
from loratools.core.routes import route
from loratools.core.rows import Rows, rowwise
from loratools.core.update import Array, Delta, Leaf, Update, kind, namespace, shape_of, working_dtype
from loratools.errors import FormatError, MismatchError, UsageError
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank, concatenate, low_ranks, with_low_ranks
from loratools.kinds.sum import Sum
from loratools.linalg import factored, seeds
from loratools.linalg.factored import SVD
from loratools.linalg.namespace import down, dtype_name, up


@kind("stack")
class Stack(Delta):
    """D_e = scale * b_e @ a_e for e = 1 .. E: b (E, out, r), a (E, r, in). ``shape`` is (E, out, in), or of as many.

    Its matrix view, in which svd, products and norms are meant, is block diagonal: (E * out, E * in), expert by expert.
    Raises :class:`FormatError` where the factors do not multiply, have no rank, or do not fit ``shape``.
    """

    b: Leaf | Array
    a: Leaf | Array
    scale: float = 1.0
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        b, a = shape_of(self.b), shape_of(self.a)
        if len(b) != 3 or len(a) != 3 or b[0] != a[0] or b[2] != a[1]:
            got = f"b {b}, a {a}"
            raise FormatError("the factors do not multiply", expected="b (E, out, r) and a (E, r, in)", got=got)
        if 0 in b or 0 in a:
            raise FormatError("a factor has no elements", expected="rank and sizes of at least 1", got=f"b {b}, a {a}")
        shape = tuple(self.shape) or (b[0], b[1], a[2])
        if (*shape[:2], prod(shape[2:])) != (b[0], b[1], a[2]):
            raise FormatError("the factors do not fit the parameter", expected=shape, got=f"b {b}, a {a}")
        object.__setattr__(self, "shape", shape)

    @property
    def rank(self) -> int:
        """The inner dimension of every expert."""
        return shape_of(self.b)[2]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(E * out, E * in): the view is block diagonal."""
        experts, out, _ = shape_of(self.b)
        return experts * out, experts * shape_of(self.a)[2]

    def factors(self, dtype: str | None = None) -> tuple[Array, Array]:
        """Read both factors for arithmetic: fp32, or fp64 where stored so or asked for."""
        dtype = dtype or working_dtype(self.b, self.a)
        return up(self.b, dtype), up(self.a, dtype)

    def matmul(self, x: Array) -> Array:
        """Return s * b_e (a_e x_e) for all e, x (E * in, k) -> (E * out, k); O(E (m + n) r k)."""
        dtype = working_dtype(self.b, self.a, x)
        b, a = self.factors(dtype)
        return self.scale * (b @ (a @ _split(up(x, dtype), a.shape[0]))).reshape(-1, x.shape[1])

    def rmatmul(self, y: Array) -> Array:
        """Return s * a_e^T (b_e^T y_e) for all e, y (E * out, k) -> (E * in, k); O(E (m + n) r k)."""
        dtype = working_dtype(self.b, self.a, y)
        b, a = self.factors(dtype)
        return self.scale * (a.mT @ (b.mT @ _split(up(y, dtype), a.shape[0]))).reshape(-1, y.shape[1])

    def dense(self) -> Array:
        """Return D in ``shape``; O(E m n r)."""
        b, a = self.factors()
        return ((self.scale * b) @ a).reshape(self.shape)

    def matrix(self) -> Array:
        """Return the block-diagonal view, formed: E times the size of D."""
        rows, columns = self.matrix_shape
        return block_diagonal(self.dense().reshape(rows, columns // self.shape[0]), self.shape[0])

    @classmethod
    def example(cls, seed: int) -> Self:
        """Three experts of 5 x 7, rank 2, scaled by 2."""
        b = seeds.uniform(seeds.key_of(seed, "stack.b"), 15, 2).reshape(3, 5, 2) - 0.5
        return cls(b, seeds.uniform(seeds.key_of(seed, "stack.a"), 6, 7).reshape(3, 2, 7) - 0.5, 2.0)


def _split(x: Array, experts: int) -> Array:
    return x.reshape(experts, -1, x.shape[1])


def stacked(parts: Sequence[LowRank], shape: tuple[int, ...]) -> Stack:
    """Return low-rank updates as one stack, padded with zeros to the largest rank.

    Equal scales are kept; unequal ones are multiplied into b. Reads nothing that is not in memory yet.
    """
    rank = max(u.rank for u in parts)
    scale = parts[0].scale if len({u.scale for u in parts}) == 1 else 1.0
    bs = [u.b if u.scale == scale else down(up(u.b) * u.scale, dtype_name(u.b)) for u in parts]
    return Stack(_pile(bs, 1, rank), _pile([u.a for u in parts], 0, rank), scale, shape)


def _pile(tensors: Sequence[Leaf | Array], axis: int, rank: int) -> Leaf | Array:
    """Return equally typed matrices padded to ``rank`` along ``axis`` and stacked; lazily if all are leaves."""
    shape = tuple(rank if i == axis else n for i, n in enumerate(shape_of(tensors[0])))
    if all(isinstance(t, Leaf) for t in tensors):
        leaves = [t for t in tensors if isinstance(t, Leaf)]
        return Leaf((len(leaves), *shape), leaves[0].dtype, lambda out: _pile([t.read() for t in leaves], axis, rank))
    arrays = [t.read() if isinstance(t, Leaf) else t for t in tensors]
    return namespace(*arrays).stack([widened(x, axis, rank) for x in arrays])


@low_ranks.register(Stack)
def _(u: Stack) -> tuple[LowRank, ...]:
    pairs = zip(_experts(u.b), _experts(u.a), strict=True)
    return tuple(LowRank(b, a, u.scale, u.shape[1:]) for b, a in pairs)


def _experts(t: Leaf | Array) -> list[Leaf | Array]:
    """Return the matrices of a stack; of a leaf, handles that share one reading."""
    if not isinstance(t, Leaf):
        return [t[e, ...] for e in range(t.shape[0])]
    whole = cache(t.read)
    return [Leaf(t.shape[1:], t.dtype, lambda out, e=e: whole()[e, ...]) for e in range(t.shape[0])]  # type: ignore[misc]


@with_low_ranks.register(Stack)
def _(u: Stack, new: Sequence[LowRank]) -> Update:
    return stacked(new, u.shape)


@low_ranks.register(Sum)
def _(u: Sum) -> tuple[LowRank, ...] | None:
    parts = [low_ranks(p) for p in u.parts]
    known = [p for p in parts if p is not None]
    if len(known) < len(parts) or len({len(p) for p in known}) > 1:
        return None
    return tuple(concatenate(column) for column in zip(*known, strict=True))


@with_low_ranks.register(Sum)
def _(u: Sum, new: Sequence[LowRank]) -> Update:
    return new[0] if len(new) == 1 and new[0].shape == u.shape else stacked(new, u.shape)


@generic.svd.register(Stack)
def _(u: Stack, k: int, *, seed: int = 0) -> SVD:
    if not 1 <= k <= min(u.matrix_shape):
        raise UsageError("too many singular triplets asked for", expected=f"1 to {min(u.matrix_shape)}", got=k)
    found = [factored.svd(part.b, part.a, scale=part.scale) for part in low_ranks(u) or ()]
    xp = namespace(found[0].s)
    s = xp.concat([one.s for one in found])
    if k > s.shape[0]:
        return generic.svd(Dense(u.matrix()), k)  # more than there are: a basis of the rest is needed
    left = _diagonal([one.u for one in found])
    right = _diagonal([one.vh.mT for one in found])
    first = xp.flip(xp.argsort(s))[:k]
    return SVD(xp.take(left, first, axis=1), xp.take(s, first), xp.take(right, first, axis=1).mT)


def _diagonal(blocks: Sequence[Array]) -> Array:
    """Return equally sized blocks on the diagonal of a matrix of zeros."""
    return block_diagonal(namespace(*blocks).concat(list(blocks)), len(blocks))


@generic.svdvals.register(Stack)
def _(u: Stack) -> Array:
    found = [factored.singular_values(part.b, part.a, scale=part.scale) for part in low_ranks(u) or ()]
    xp = namespace(*found)
    return xp.flip(xp.sort(xp.concat(found)))


@generic.inner.register(Stack)
def _(u: Stack, v: Delta) -> float:
    if u.shape != v.shape:
        raise MismatchError("inner product of different shapes", expected=u.shape, got=v.shape)
    if isinstance(v, Stack):
        pairs = zip(low_ranks(u) or (), low_ranks(v) or (), strict=True)
        return float(sum(generic.inner(one, other) for one, other in pairs))
    return float((up(u.dense(), "float64") * up(v.dense(), "float64")).sum())


@route(Stack, Dense, cost=10.0)
def _form(u: Stack) -> Update:
    return Dense(u.dense())


@rowwise.register(Stack)
def _(u: Stack) -> Rows:
    factors = cache(u.factors)  # read once, for the first experts

    def rows(start: int, stop: int) -> Update:
        b, a = factors()
        return replace(u, b=b[start:stop, ...], a=a[start:stop, ...], shape=(stop - start, *u.shape[1:]))

    return rows
