"""LowRank: D = scale * b @ a, the update that LoRA stores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, singledispatch
from math import prod
from typing import Self

from loratools.core import generic
from loratools.core.routes import route
from loratools.core.rows import Rows, rowwise
from loratools.core.update import Array, Delta, Leaf, Update, kind, namespace, shape_of, working_dtype
from loratools.errors import ConversionError, FormatError, MismatchError, NumericsError, UsageError
from loratools.kinds.dense import Dense
from loratools.linalg import factored, seeds
from loratools.linalg.factored import SVD
from loratools.linalg.namespace import down, dtype_name, up

LOSSY_ERROR = 0.01  # of the one inexact route: squeeze says other targets


@kind("lowrank")
class LowRank(Delta):
    """D = scale * b @ a with b (out, r), a (r, in). ``shape`` may be a convolution's, with in = product of the rest.

    Raises :class:`FormatError` where the factors do not multiply, have no rank, or do not fit ``shape``.
    """

    b: Leaf | Array
    a: Leaf | Array
    scale: float = 1.0
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        b, a = shape_of(self.b), shape_of(self.a)
        if len(b) != 2 or len(a) != 2 or b[1] != a[0]:
            raise FormatError("the factors do not multiply", expected="b (out, r) and a (r, in)", got=f"b {b}, a {a}")
        if 0 in b or 0 in a:
            raise FormatError("a factor has no elements", expected="rank and sizes of at least 1", got=f"b {b}, a {a}")
        shape = tuple(self.shape) or (b[0], a[1])
        if (shape[0], prod(shape[1:])) != (b[0], a[1]):
            raise FormatError("the factors do not fit the parameter", expected=shape, got=f"b {b}, a {a}")
        object.__setattr__(self, "shape", shape)

    @property
    def rank(self) -> int:
        """The inner dimension, whatever the numerical rank."""
        return shape_of(self.b)[1]

    def factors(self, dtype: str | None = None) -> tuple[Array, Array]:
        """Read both factors for arithmetic: fp32, or fp64 where stored so or asked for."""
        dtype = dtype or working_dtype(self.b, self.a)
        return up(self.b, dtype), up(self.a, dtype)

    def matmul(self, x: Array) -> Array:
        """Return s * b (a x); O((m + n) r k)."""
        dtype = working_dtype(self.b, self.a, x)
        b, a = self.factors(dtype)
        return self.scale * (b @ (a @ up(x, dtype)))

    def rmatmul(self, y: Array) -> Array:
        """Return s * a^T (b^T y); O((m + n) r k)."""
        dtype = working_dtype(self.b, self.a, y)
        b, a = self.factors(dtype)
        return self.scale * (a.T @ (b.T @ up(y, dtype)))

    def dense(self) -> Array:
        """Return s * b a in ``shape``; O(m n r)."""
        b, a = self.factors()
        return ((self.scale * b) @ a).reshape(self.shape)

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 7 update of rank 3 and scale 2."""
        b = seeds.uniform(seeds.key_of(seed, "lowrank.b"), 5, 3) - 0.5
        return cls(b, seeds.uniform(seeds.key_of(seed, "lowrank.a"), 3, 7) - 0.5, 2.0)


def canonical(u: LowRank, result: factored.Truncation, *, scale: float = 1.0, dtype: str | None = None) -> LowRank:
    """Return the balanced factors of a truncation in the storage dtypes of ``u`` (or ``dtype``), at the given scale.

    The truncation has every scale folded in; a scale other than 1 divides both factors by its root (sign on b).
    """
    root = abs(scale) ** 0.5
    b, a = result.b, result.a
    if scale != 1.0:
        b, a = b * ((1 if scale > 0 else -1) / root), a / root
    return LowRank(down(b, dtype or dtype_name(u.b)), down(a, dtype or dtype_name(u.a)), scale, u.shape)


def restated(u: LowRank, *, scale: float, dtype: str | None = None) -> LowRank:
    """Return the same factors said at another scale (b takes the ratio) and stored as ``dtype``.

    Exact where the ratio is a power of two and no dtype narrows; otherwise one rounding per entry.
    """
    b, a = u.b, u.a
    if scale != u.scale:
        b = down(up(b, working_dtype(b)) * (u.scale / scale), dtype or dtype_name(b))
    return LowRank(stored_as(b, dtype), stored_as(a, dtype), scale, u.shape)


def restates_exactly(u: LowRank, scale: float, dtype: str | None = None) -> bool:
    """True if :func:`restated` would round nothing: a ratio that is a power of two, in range, and no narrower dtype."""
    ratio = u.scale / scale
    if ratio == 1.0 and dtype in (None, dtype_name(u.b)) and dtype in (None, dtype_name(u.a)):
        return True
    b = up(u.b, "float64") * ratio
    pairs = ((b, dtype or dtype_name(u.b)), (up(u.a, "float64"), dtype or dtype_name(u.a)))
    try:
        return all(bool(namespace(x).all(up(down(x, name), "float64") == x)) for x, name in pairs)
    except NumericsError:  # out of range
        return False


def stored_as(t: Leaf | Array, dtype: str | None) -> Leaf | Array:
    """Return the tensor in another storage dtype; as it is where that is its own, or none is asked for."""
    return t if dtype in (None, dtype_name(t)) else down(up(t, working_dtype(t)), dtype)


def padded(u: LowRank, rank: int, *, name: str, seed: int = 0) -> LowRank:
    """Return ``u`` with ``rank`` columns: zero columns in b keep the function, random rows in a can train.

    The new rows are uniform in +-1/sqrt(in), as LoRA's own initialisation draws them, keyed by ``seed`` and ``name``.
    """
    extra = rank - u.rank
    if extra <= 0:
        return u
    b, a = u.factors()
    xp = namespace(b)
    rows = 2.0 * seeds.uniform(seeds.key_of(seed, f"pad:{name}"), range(u.rank, rank), a.shape[1], like=a) - 1.0
    b = xp.concat([b, xp.zeros((b.shape[0], extra), dtype=b.dtype, device=b.device)], axis=1)
    a = xp.concat([a, down(rows / a.shape[1] ** 0.5, dtype_name(a))], axis=0)
    return LowRank(down(b, dtype_name(u.b)), down(a, dtype_name(u.a)), u.scale, u.shape)


@singledispatch
def low_rank(u: Update) -> LowRank | None:
    """Return the exact :class:`LowRank` that squeezing may act on, or None where the update is carried as it is.

    A coat answers with its direction, and :func:`with_low_rank` puts the new direction back.
    """
    return None


@singledispatch
def with_low_rank(u: Update, new: LowRank) -> Update:
    """Return ``u`` with what :func:`low_rank` showed replaced by ``new``."""
    return new


@singledispatch
def low_ranks(u: Update) -> tuple[LowRank, ...] | None:
    """Return every exact :class:`LowRank` inside ``u``: one, or one per expert of a stack; None as :func:`low_rank`."""
    direction = low_rank(u)
    return None if direction is None else (direction,)


@singledispatch
def with_low_ranks(u: Update, new: Sequence[LowRank]) -> Update:
    """Return ``u`` with what :func:`low_ranks` showed replaced, in order; a stack pads its experts to one rank."""
    (only,) = new
    return with_low_rank(u, only)


@low_rank.register(LowRank)
def _(u: LowRank) -> LowRank:
    return u


@generic.transposed.register(LowRank)
def _(u: LowRank) -> LowRank:
    return LowRank(u.a.T, u.b.T, u.scale)


@generic.svd.register(LowRank)
def _(u: LowRank, k: int, *, seed: int = 0) -> SVD:
    if not 1 <= k <= min(u.matrix_shape):
        raise UsageError("too many singular triplets asked for", expected=f"1 to {min(u.matrix_shape)}", got=k)
    if k > u.rank:
        return generic.svd(Dense(u.dense()), k)  # more than there are: a basis of the rest is needed
    left, s, right = factored.svd(u.b, u.a, scale=u.scale)
    return SVD(left[:, :k], s[:k], right[:k, :])


@generic.svdvals.register(LowRank)
def _(u: LowRank) -> Array:
    return factored.singular_values(u.b, u.a, scale=u.scale)


@generic.inner.register(LowRank)
def _(u: LowRank, v: Delta) -> float:
    if u.matrix_shape != v.matrix_shape:
        raise MismatchError("inner product of different shapes", expected=u.shape, got=v.shape)
    if isinstance(v, LowRank):
        return u.scale * v.scale * factored.inner(u.b, u.a, v.b, v.a)
    b, a = u.factors()
    other = v.rmatmul(b).T  # b^T V, (r, in)
    return u.scale * float((up(other, "float64") * up(a, "float64")).sum())


@route(LowRank, Dense, cost=10.0)
def _form(u: LowRank) -> Update:
    return Dense(u.dense())


@route(Dense, LowRank, exact=False)
def _truncated(u: Dense) -> Update:
    """The smallest rank within ``LOSSY_ERROR`` of the difference, relative, Frobenius; O(m n min(m, n))."""
    if len(u.shape) < 2:
        raise ConversionError("a vector has no low-rank factors", got=u.shape)
    left, s, right = generic.svd(u, min(u.matrix_shape))
    square = s * s
    tail = square.sum() - namespace(s).cumulative_sum(square)
    k = min(1 + int((tail > LOSSY_ERROR**2 * square.sum()).sum()), len(s))
    root = s[:k] ** 0.5
    dtype = dtype_name(u.d)
    return LowRank(down(left[:, :k] * root, dtype), down(root[:, None] * right[:k, :], dtype), 1.0, u.shape)


def concatenate(parts: tuple[LowRank, ...]) -> LowRank:
    """Return the exact sum of low-rank updates: factors side by side, scales on b; rank is the sum of ranks."""
    dtype = working_dtype(*(t for u in parts for t in (u.b, u.a)))
    pairs = [(u.scale, *u.factors(dtype)) for u in parts]
    xp = namespace(pairs[0][1])
    b = xp.concat([s * b for s, b, _ in pairs], axis=1)
    a = xp.concat([a for _, _, a in pairs], axis=0)
    return LowRank(b, a, 1.0, parts[0].shape)


@rowwise.register(LowRank)
def _(u: LowRank) -> Rows:
    factors = cache(u.factors)  # read once, for the first rows
    return lambda start, stop: LowRank(factors()[0][start:stop, :], factors()[1], u.scale, (stop - start, *u.shape[1:]))
