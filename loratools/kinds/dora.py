"""Dora: a low-rank direction under a stored magnitude (weight-decomposed adaptation, arXiv:2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from loratools.core.generic import need_delta, transposed
from loratools.core.pool import parallel_map
from loratools.core.rows import Rows, row_ranges, rowwise, slice_rows
from loratools.core.update import Array, Delta, Leaf, Update, kind, namespace, shape_of, tensor_bytes, working_dtype
from loratools.dispatch import considered
from loratools.errors import FormatError, MismatchError, NumericsError
from loratools.kinds.lowrank import LowRank, low_rank, with_low_rank
from loratools.linalg import row_norms, seeds
from loratools.linalg.namespace import device_of, down, dtype_name, is_float, up

RANGE_BYTES = 8 << 20  # rows given to one thread at a time


@kind("dora")
class Dora(Update):
    """W' = magnitude * (W + D) / (||W + D|| + eps), the norm over all axes but ``axis`` of the stored parameter.

    ``magnitude`` is a vector of length shape[axis]; ``axis`` is 0 for (out, in) storage, 1 for (in, out).
    """

    direction: Delta
    magnitude: Leaf | Array
    axis: int = 0
    eps: float = 0.0

    def __post_init__(self) -> None:
        if shape_of(self.magnitude) != (self.direction.shape[self.axis],):
            raise FormatError(
                "the magnitude does not fit the direction",
                expected=(self.direction.shape[self.axis],),
                got=shape_of(self.magnitude),
            )

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return self.direction.shape

    def apply(self, w: Array | None) -> Array:
        """Return the renormalised sum, rounded once to the dtype of ``w``."""
        base = self._checked(w)
        if considered(w):
            return down(base + self.change(w)[0], dtype_name(w))
        gain, d = self.split(base)
        return down(along(gain, self.axis, len(self.shape)) * (base + d), dtype_name(w))

    def delta(self, w: Array) -> DoraDelta:
        """Return (g - 1) W + g D with g = magnitude / ||W + D||, as an operator that forms nothing of W's size."""
        base = self._checked(w)
        return DoraDelta(base, self.direction, self.gain(base), self.axis)

    def change(self, w: Array) -> tuple[Array, Array]:
        """Return W' - W = (g - 1) W + g D and the gain g; on a GPU nothing but the result has the size of W."""
        flat = _rows_of_product(self.direction, self.axis) if considered(w) else None
        if flat is not None:
            gain = self.gain(w)
            return row_norms.compose(w, flat.b, flat.a, gain, scale=flat.scale), gain
        gain, d = self.split(up(w, working_dtype(w, self.magnitude)))
        wide = along(gain, self.axis, len(self.shape))
        return (wide - 1.0) * w + wide * d, gain

    def split(self, w: Array) -> tuple[Array, Array]:
        """Return the gain and D formed, W being in fp32 or fp64: W' = g (W + D)."""
        d = self.direction.dense()
        return self.gain_of(axis_norms(w + d, self.axis), dtype_name(w)), d

    def gain(self, w: Leaf | Array) -> Array:
        """Return magnitude / (||W + D|| + eps), a vector of length shape[axis]; W is read by blocks where it can be."""
        return self.gain_of(sum_norms(w, self.direction, self.axis), working_dtype(w, self.magnitude))

    def _checked(self, w: Array | None) -> Array:
        if w is None or shape_of(w) != self.shape:
            got = "no base parameter" if w is None else shape_of(w)
            raise MismatchError("a magnitude needs its base parameter", expected=self.shape, got=got)
        return up(w, working_dtype(w, self.magnitude))

    def gain_of(self, norms: Array, dtype: str = "float64") -> Array:
        """Return magnitude / (norms + eps), in the given dtype. Raises NumericsError for a norm of zero."""
        norms = norms + self.eps
        if not bool(namespace(norms).all(norms > 0)):
            raise NumericsError("a row of W + D is zero or not a number, its direction is undefined")
        return up(self.magnitude, dtype) / up(norms, dtype)

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 7 direction of rank 3 with magnitudes near 1."""
        return cls(LowRank.example(seed), seeds.uniform(seeds.key_of(seed, "dora"), 5, 1)[:, 0] + 0.5)


@transposed.register(Dora)
def _(u: Dora) -> Dora:
    return replace(u, direction=need_delta(transposed(u.direction)), axis=1 - u.axis)


@dataclass(frozen=True)
class DoraDelta(Delta):
    """D = (g - 1) W + g D0 of a :class:`Dora` on its base, lazily: nothing cancels where g is near 1."""

    kind: ClassVar[str] = "dora delta"
    base: Array
    direction: Delta
    gain: Array
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the base parameter."""
        return self.direction.shape

    def dense(self) -> Array:
        """Return D in ``shape``."""
        gain = along(self.gain, self.axis, len(self.shape))
        return (gain - 1.0) * self.base + gain * self.direction.dense()

    def matmul(self, x: Array) -> Array:
        """Return D x; O(m n k) for W x."""
        w = self.base.reshape(self.matrix_shape)
        x = up(x, working_dtype(self.base, x))
        if self.axis == 0:
            gain = self.gain[:, None]
            return (gain - 1.0) * (w @ x) + gain * self.direction.matmul(x)
        gain = self._columns()
        return w @ ((gain - 1.0) * x) + self.direction.matmul(gain * x)

    def rmatmul(self, y: Array) -> Array:
        """Return D^T y; O(m n k) for W^T y."""
        w = self.base.reshape(self.matrix_shape)
        y = up(y, working_dtype(self.base, y))
        if self.axis == 0:
            gain = self.gain[:, None]
            return w.T @ ((gain - 1.0) * y) + self.direction.rmatmul(gain * y)
        gain = self._columns()
        return (gain - 1.0) * (w.T @ y) + gain * self.direction.rmatmul(y)

    def _columns(self) -> Array:
        """Return the gain of every column of the matrix view, (columns, 1)."""
        xp = namespace(self.gain)
        return xp.broadcast_to(along(self.gain, self.axis - 1, len(self.shape) - 1), self.shape[1:]).reshape(-1, 1)

    @classmethod
    def example(cls, seed: int) -> Self:
        """The difference that the example of :class:`Dora` makes to a random base."""
        made = Dora.example(seed).delta(seeds.uniform(seeds.key_of(seed, "base"), 5, 7) - 0.5)
        return cls(made.base, made.direction, made.gain, made.axis)


def axis_norms(v: Array, axis: int) -> Array:
    """Return the Euclidean norms of the slices of ``v`` along ``axis``: vector of length v.shape[axis]."""
    if axis == 0:
        return row_norms.norms(v)
    xp = namespace(v)
    others = tuple(i for i in range(len(v.shape)) if i != axis)
    return xp.sqrt(xp.sum(v * v, axis=others))


def sum_norms(w: Leaf | Array, direction: Delta, axis: int = 0) -> Array:
    """Return the norms of the slices of W + D along ``axis``, as :func:`axis_norms` of the sum.

    A low-rank direction along axis 0 goes by blocks of rows in all threads, in O(m n r) and a few MB, also where W is
    still on the disk; anything else forms the sum.
    """
    flat = _rows_of_product(direction, axis)
    if flat is None:
        return axis_norms(up(w, working_dtype(w)) + direction.dense(), axis)
    if considered(flat.b) or device_of(w) != "cpu":
        there = w.read() if isinstance(w, Leaf) else w
        return row_norms.row_norms_many([there], [flat.b], [flat.a], [flat.scale])[0]
    b, a = flat.factors(working_dtype(w, flat.b, flat.a))
    found = parallel_map(
        lambda rows: row_norms.row_norms(slice_rows(w, *rows), b[rows[0] : rows[1], :], a, scale=flat.scale),
        ranges := row_ranges(w, RANGE_BYTES),
        weights=[tensor_bytes(w) // len(ranges)] * len(ranges),
    )
    return namespace(b).concat(found)


def _rows_of_product(direction: Delta, axis: int) -> LowRank | None:
    """Return the factors of a matrix whose rows a magnitude scales; None for other axes, shapes and kinds."""
    return low_rank(direction) if axis == 0 and len(direction.shape) == 2 else None


def along(vector: Array, axis: int, ndim: int) -> Array:
    """Return the vector shaped to broadcast along ``axis`` of an array with ``ndim`` axes."""
    return vector.reshape(tuple(-1 if i == axis else 1 for i in range(ndim)))


def refitted(old: Dora, new: Dora, w: Array) -> Dora:
    """Return ``new`` with the magnitude that brings it nearest to ``old`` on base ``w`` (least squares per row).

    With v, v' the rows of W + D and W + D': m'_i = <m_i v_i / |v_i|, v'_i / |v'_i|> = m_i cos(v_i, v'_i); a row of
    zeros has no direction, and its m stays. Raises :class:`MismatchError` for another shape or no floating dtype, and
    :class:`NumericsError` for a base that is not finite.
    """
    if shape_of(w) != old.shape or not is_float(dtype_name(w)):
        got = f"{shape_of(w)} {dtype_name(w)}"
        raise MismatchError("the base does not fit the magnitude", expected=f"{old.shape} of floats", got=got)
    cosine = _cosines(old, new, w)
    magnitude = up(old.magnitude, working_dtype(w, old.magnitude)) * up(cosine, working_dtype(w, old.magnitude))
    return replace(new, magnitude=down(magnitude, dtype_name(old.magnitude)))


def _cosines(old: Dora, new: Dora, w: Array) -> Array:
    """Return the cosines between the slices of W + D and W + D' along the axis, by blocks where these are rows."""
    one, other = (rowwise(u.direction) if u.axis == 0 else None for u in (old, new))
    if one is None or other is None:
        return _cosine(up(w, working_dtype(w)), old.direction, new.direction, old.axis)
    parts = [
        _cosine(up(w[i:j], working_dtype(w)), need_delta(one(i, j)), need_delta(other(i, j)), 0)
        for i, j in row_ranges(w, RANGE_BYTES)
    ]
    return namespace(parts[0]).concat(parts)


def _cosine(base: Array, old: Delta, new: Delta, axis: int) -> Array:
    v, v2 = base + old.dense(), base + new.dense()
    others = tuple(i for i in range(len(v.shape)) if i != axis)
    xp = namespace(v)
    size = axis_norms(v, axis) * axis_norms(v2, axis)
    if not bool(xp.all(xp.isfinite(size))):
        raise NumericsError("the base parameter is not finite")
    return xp.where(size > 0, xp.sum(v * v2, axis=others) / xp.where(size > 0, size, 1.0), 1.0)


@low_rank.register(Dora)
def _(u: Dora) -> LowRank | None:
    return low_rank(u.direction)


@with_low_rank.register(Dora)
def _(u: Dora, new: LowRank) -> Update:
    return replace(u, direction=new)


@rowwise.register(Dora)
def _(u: Dora) -> Rows | None:
    inner = rowwise(u.direction) if u.axis == 0 else None
    if inner is None:
        return None
    return lambda start, stop: replace(
        u, direction=need_delta(inner(start, stop)), magnitude=slice_rows(u.magnitude, start, stop)
    )


@rowwise.register(DoraDelta)
def _(u: DoraDelta) -> Rows | None:
    inner = rowwise(u.direction) if u.axis == 0 else None
    if inner is None:
        return None
    return lambda start, stop: DoraDelta(
        u.base[start:stop, ...], need_delta(inner(start, stop)), u.gain[start:stop], u.axis
    )
