"""The matrices of a manifest's algebra: products, stacks, networks and wavelets of tensors that nobody has read yet.

Everything is a handle until the update is used; what is computed is computed in fp64 and kept in fp32 (fp64 where a
tensor is). Factors stay factors wherever they are smaller than their product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

from loratools.core.generic import need_delta, transposed
from loratools.core.lazy import computed, permuted
from loratools.core.update import Array, Delta, Leaf, namespace, shape_of, tensors, working_dtype
from loratools.errors import FormatError
from loratools.formats.pairs import number
from loratools.kinds.dense import Dense
from loratools.kinds.hadamard import Hadamard
from loratools.kinds.kronecker import Kronecker
from loratools.kinds.lowrank import LowRank
from loratools.kinds.sum import Sum
from loratools.linalg.namespace import down, up
from loratools.linalg.subbands import FILTERS, synthesis


@dataclass(frozen=True)
class Diagonal:
    """A vector that stands for a diagonal matrix; it lives inside products only."""

    v: Leaf


Value = Leaf | Delta | Diagonal


def matrix(value: Value) -> Delta:
    """Return a value as an update of two axes or more; vectors are refused."""
    if isinstance(value, Diagonal):
        v = value.v
        return Dense(made((v.shape[0],) * 2, [v], lambda x: namespace(x).eye(x.shape[0], dtype=x.dtype) * x))
    if isinstance(value, Leaf):
        if len(value.shape) < 2:
            raise FormatError("a vector where a matrix is meant", expected='{diag = "TENSOR"}', got=value.shape)
        return Dense(value)
    return value


def made(shape: tuple[int, ...], sources: Sequence[Leaf | Array | Delta], compute: Callable[..., Array]) -> Leaf:
    """Return the handle of ``compute(*sources)``: read in fp64 (updates as they are), kept in the sources' dtype."""
    held = [t for s in sources for t in ([t for _, t in tensors(s)] if isinstance(s, Delta) else [s])]
    dtype = working_dtype(*held)

    def run() -> Array:
        return down(compute(*(s if isinstance(s, Delta) else up(s, "float64") for s in sources)), dtype)

    return computed(shape, run, dtype)


def times(x: Value, y: Value) -> Value:
    """Return the product of two matrices: factors where they are smaller than the matrix, else one matrix."""
    if isinstance(y, Diagonal):
        if isinstance(x, Diagonal):
            return Diagonal(made(x.v.shape, [x.v, y.v], lambda a, b: a * b))
        x = matrix(x)
        _need_fit(x.matrix_shape, (y.v.shape[0],) * 2)
        if isinstance(x, LowRank):
            return LowRank(x.b, made(shape_of(x.a), [x.a, y.v], lambda a, v: a * v), x.scale)
        whole = _whole(x)
        return Dense(made(x.matrix_shape, [whole, y.v], lambda a, v: a * v))
    y = matrix(y)
    if isinstance(x, Diagonal):
        return turned(times(turned(y), x))
    x = matrix(x)
    (m, k), (k2, n) = x.matrix_shape, y.matrix_shape
    _need_fit((m, k), (k2, n))
    if isinstance(x, LowRank) and not (isinstance(y, LowRank) and y.rank < x.rank):
        return LowRank(x.b, made((x.rank, n), [x.a, y], lambda a, d: d.rmatmul(a.T).T), x.scale)
    if isinstance(y, LowRank):
        return LowRank(made((m, y.rank), [y.b, x], lambda b, d: d.matmul(b)), y.a, y.scale)
    if k * (m + n) < m * n:
        return LowRank(_whole(x), _whole(y))
    return Dense(made((m, n), [_whole(y), x], lambda b, d: d.matmul(b)))


def _whole(u: Delta) -> Leaf | Array:
    """Return an update's matrix as one tensor, formed when it is read."""
    if isinstance(u, Dense) and u.scale == 1.0 and len(u.shape) == 2:
        return u.d
    return made(u.matrix_shape, [u], lambda d: d.matrix())


def _need_fit(x: tuple[int, int], y: tuple[int, int]) -> None:
    if x[1] != y[0]:
        raise FormatError("the factors of a product do not multiply", expected=f"({x[1]}, ...)", got=y)


def turned(value: Value) -> Value:
    """Return the transpose."""
    return value if isinstance(value, Diagonal) else need_delta(transposed(matrix(value)))


def stacked(parts: Sequence[Delta]) -> Delta:
    """Return the parts under each other; factors stay factors where that is smaller."""
    rows, columns = [p.matrix_shape[0] for p in parts], {p.matrix_shape[1] for p in parts}
    if len(columns) > 1:
        raise FormatError("stacked parts differ in width", got=", ".join(str(p.matrix_shape) for p in parts))
    m, n = sum(rows), columns.pop()
    ranks = [p.rank if isinstance(p, LowRank) else min(p.matrix_shape) for p in parts]
    if all(isinstance(p, LowRank) for p in parts) and sum(ranks) * (m + n) < m * n:
        below = [p for p in parts if isinstance(p, LowRank)]
        a = made((sum(ranks), n), [p.a for p in below], lambda *xs: namespace(xs[0]).concat(xs, axis=0))
        return LowRank(_spread([p.b for p in below], [p.scale for p in below]), a)
    return Dense(made((m, n), list(map(_whole, parts)), lambda *xs: namespace(xs[0]).concat(xs, axis=0)))


def _spread(blocks: Sequence[Leaf | Array], scales: Sequence[float]) -> Leaf:
    """Return matrices on a diagonal, each times its scale."""
    sizes = [shape_of(b) for b in blocks]
    total = sum(m for m, _ in sizes), sum(n for _, n in sizes)

    def run(*xs: Array) -> Array:
        xp = namespace(xs[0])
        lines, before = [], 0
        for x, s in zip(xs, scales, strict=True):
            gaps = (before, total[1] - before - x.shape[1])
            zeros = [xp.zeros((x.shape[0], gap), dtype=x.dtype) for gap in gaps]
            lines.append(xp.concat([zeros[0], s * x, zeros[1]], axis=1))
            before += x.shape[1]
        return xp.concat(lines, axis=0)

    return made(total, blocks, run)


def on_diagonal(parts: Sequence[Delta]) -> Delta:
    """Return the parts on a diagonal, zero elsewhere."""
    if all(isinstance(p, LowRank) for p in parts):
        flat = [p for p in parts if isinstance(p, LowRank)]
        b, a = _spread([p.b for p in flat], [p.scale for p in flat]), _spread([p.a for p in flat], [1.0] * len(flat))
        return LowRank(b, a)
    return Dense(_spread(list(map(_whole, parts)), [1.0] * len(parts)))


def added(parts: Sequence[Delta]) -> Delta:
    """Return the sum of the parts; whole matrices are added when they are read."""
    if len({p.matrix_shape for p in parts}) > 1:
        raise FormatError("the parts of a sum differ", got=", ".join(str(p.matrix_shape) for p in parts))
    if all(isinstance(p, Dense) for p in parts):
        return Dense(made(parts[0].shape, list(map(_whole, parts)), lambda *xs: sum(xs[1:], xs[0])))
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))


def scaled(value: Value, by: Any) -> Value:
    """Return a value times a number, or times a tensor of one element."""
    factor = number(by) if isinstance(by, Leaf) else by
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise FormatError("a scale is no number", expected="by = NUMBER or a tensor of one element", got=repr(by)[:80])
    if isinstance(value, Diagonal):
        return Diagonal(made(value.v.shape, [value.v], lambda v: factor * v))
    u = matrix(value)
    if isinstance(u, Sum):
        return Sum(tuple(need_delta(matrix(scaled(p, factor))) for p in u.parts))
    if not isinstance(u, Dense | LowRank | Kronecker | Hadamard):
        raise FormatError("an expression that cannot be scaled", got=u.kind)
    return replace(u, scale=factor * u.scale)


def network(core: Value, left: Sequence[Value], right: Sequence[Value]) -> Value:
    """Return kron(left) . core . kron(right)^T for a core (r_1, ..., r_p, s_1, ..., s_q): a Tucker network unfolded."""
    if not isinstance(core, Leaf) or len(core.shape) != len(left) + len(right) or not left or not right:
        got = f"{getattr(core, 'shape', '')}, {len(left)} left, {len(right)} right"
        raise FormatError("a Tucker network wants one factor per axis of its core", got=got)
    sizes = [matrix(u).matrix_shape[1] for u in (*left, *right)]
    if tuple(sizes) != core.shape:
        raise FormatError("the factors do not fit the core", expected=core.shape, got=tuple(sizes))
    middle = Dense(core.reshape((prod(core.shape[: len(left)]), prod(core.shape[len(left) :]))))
    return times(times(krons(left), middle), turned(krons(right)))


def krons(parts: Sequence[Value]) -> Delta:
    """Return the Kronecker product, the first factor outermost."""
    return reduce(Kronecker, map(matrix, parts))


def subbands(value: Value, family: Any, axes: Any) -> Delta:
    """Return S value S^T (or one side of it) for an orthonormal synthesis S of one level."""
    sides = isinstance(axes, list) and axes and all(side in ("rows", "columns") for side in axes)
    if not isinstance(family, str) or family not in FILTERS or not sides:
        expected = f"family of {', '.join(FILTERS)}; axes of rows, columns"
        raise FormatError("unknown wavelet or axes", expected=expected, got=f"{family}, {axes}")
    u = matrix(value)
    for axis, name in enumerate(("rows", "columns")):
        if name in axes and u.matrix_shape[axis] % 2:
            raise FormatError("a wavelet transform halves its axis", expected="an even size", got=u.matrix_shape)

    def both(x: Array, sides: Sequence[str]) -> Array:
        x = synthesis(x, family) if "rows" in sides else x
        return synthesis(x.T, family).T if "columns" in sides else x

    rows, columns = [side for side in axes if side == "rows"], [side for side in axes if side == "columns"]
    if isinstance(u, LowRank):
        b = made(shape_of(u.b), [u.b], lambda x: both(x, rows)) if rows else u.b
        a = made(shape_of(u.a), [u.a], lambda x: both(x, columns)) if columns else u.a
        return LowRank(b, a, u.scale)
    return Dense(made(u.matrix_shape, [_whole(u)], lambda x: both(x, axes)))


def reshaped(value: Value, shape: Any) -> Leaf:
    """Return a tensor in another shape, row-major."""
    if not isinstance(value, Leaf) or not _is_sizes(shape) or prod(shape) != prod(value.shape):
        raise FormatError("a tensor cannot be reshaped so", expected=getattr(value, "shape", "a tensor"), got=shape)
    return value.reshape(tuple(shape))


def reordered(value: Value, axes: Any) -> Leaf:
    """Return a tensor with its axes in another order."""
    if not isinstance(value, Leaf) or not isinstance(axes, list) or sorted(axes) != list(range(len(value.shape))):
        raise FormatError("a tensor has no such axes", expected=getattr(value, "shape", "a tensor"), got=axes)
    done = permuted(value, tuple(axes))
    assert isinstance(done, Leaf)
    return done


def _is_sizes(shape: Any) -> bool:
    return isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)


def vector(value: Value) -> Diagonal:
    """Return a vector (or a tensor with one long axis) as a diagonal."""
    if not isinstance(value, Leaf) or prod(value.shape) != max(value.shape, default=1):
        raise FormatError("a diagonal is a vector", got=getattr(value, "shape", "an expression"))
    return Diagonal(value.reshape((prod(value.shape),)))
