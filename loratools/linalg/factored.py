"""Numerics of a product of factors ``s * b @ a``, b (m, R) tall, a (R, n) wide, without ever forming it.

Gram matrices first (see :mod:`loratools.linalg.cores`), in fp32 with fp64 sums. A result is accepted only where it can
be trusted; otherwise it is redone with fp64 Gram matrices, and then by QR, which is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from math import inf, isfinite, prod, sqrt
from typing import NamedTuple

from loratools.dispatch import accelerable
from loratools.errors import NumericsError, UsageError
from loratools.leaf import Array, Leaf
from loratools.linalg.cores import balanced, figures, spectra, trusted
from loratools.linalg.gram import FP32, FP64, Precision, cross, grams
from loratools.linalg.namespace import (
    all_finite,
    device_of,
    down,
    dtype_name,
    namespace,
    overflow_checked,
    up,
    working_dtype,
)
from loratools.linalg.select import energy_kept, numerical_rank, tail_error

Choose = Callable[[Array], int]
TOGETHER = 1 << 19
"""Entries of factors worked on at once: few enough for the cache, many enough that calls do not count."""


class Truncation(NamedTuple):
    """A product cut to ``rank``: ``b (m, k) @ a (k, n)`` with the scale folded in, and what was cut away.

    ``singular_values (min(R, m, n),)`` in fp64, descending, of the scaled product before the cut; on the route gram32
    those far below the kept ones are rough (errors of about 5e-4 s_1), see :func:`singular_values`. ``energy`` is the
    kept share of the squared Frobenius norm, ``error`` the relative Frobenius error. ``route``: gram32, gram64 or qr.
    """

    b: Array
    a: Array
    singular_values: Array
    rank: int
    energy: float
    error: float
    route: str


class SVD(NamedTuple):
    """Singular triples ``u (m, k)``, ``s (k,)`` descending, ``vh (k, n)``."""

    u: Array
    s: Array
    vh: Array


def truncate(b: Leaf | Array, a: Leaf | Array, choose: Choose, *, scale: float = 1.0) -> Truncation:
    """Cut ``D = scale * b @ a`` to the best approximation of rank ``choose(singular values)``.

    b (m, R), a (R, n) of any float dtype -> factors in fp32 (fp64 if one input is), balanced: B'^T B' = A' A'^T =
    diag(s_1 .. s_k). ``choose`` must be a pure function of the spectrum; its answer is capped at min(R, m, n). For
    weighted norms see :mod:`loratools.linalg.weighted`.

    Cost 2 (m + n) R (R + k) flops + O(R^3). Guarantee: Frobenius error at most 1e-6 |D| above the optimum. Directions
    below 1e-7 s_1 get a zero column in B' and a unit row in A', so that they stay trainable; so does a zero product.
    Raises UsageError for shapes that do not fit, NumericsError for values that are not finite.
    """
    (only,) = _truncated([(b, a)], [scale], [choose])
    return only


@accelerable
def truncate_many(
    pairs: Sequence[tuple[Leaf | Array, Leaf | Array]], scales: Sequence[float], chooses: Sequence[Choose]
) -> list[Truncation]:
    """Truncate every ``scale * b @ a``; the shapes may differ. Same guarantees as :func:`truncate`, and the same bits.

    Small products share the calls of their R x R work. Memory: the factors of those, at most ``TOGETHER`` entries, or
    of one product.
    """
    out: list[Truncation] = []
    for part in _parts(pairs):
        out += _truncated(pairs[part], scales[part], chooses[part])
    return out


def truncate_qr(b: Leaf | Array, a: Leaf | Array, choose: Choose, *, scale: float = 1.0) -> Truncation:
    """Do what :func:`truncate` does by QR of both factors in fp64: the reference, at several times the cost."""
    b, a = checked_factors(b, a, scale)
    xp = namespace(b, a)
    u, s, vh = svd(up(b, "float64"), up(a, "float64"), scale=scale)
    k = capped(choose)(s)
    alive = s[:k] > 1e-7 * s[0]
    root = xp.sqrt(xp.where(alive, s[:k], 0.0))
    tall = down(u[:, :k] * root, dtype_name(b))
    wide = down(vh[:k, :] * xp.where(alive, root, 1.0)[:, None], dtype_name(b))
    kept = min(k, numerical_rank(s))
    return Truncation(tall, wide, s, k, energy_kept(s, kept), tail_error(s, kept), "qr")


def svd(b: Leaf | Array, a: Leaf | Array, *, scale: float = 1.0) -> SVD:
    """Return the thin SVD of ``scale * b @ a``: b (m, R), a (R, n) -> u (m, k), s (k,), vh (k, n), k = min(R, m, n).

    QR of both factors and SVD of the core, all in fp64; u and vh come back in fp32 (fp64 if one input is), s
    in fp64. Cost 4 (m + n) R^2 + O(R^3) flops. s is accurate to a few eps |b| |a|. Raises NumericsError for values that
    are not finite.
    """
    b, a = checked_factors(b, a, scale)
    if not (all_finite(b) and all_finite(a)):
        raise NumericsError("a factor is not finite")
    xp = namespace(b, a)
    qb, rb = xp.linalg.qr(up(b, "float64"))
    qa, ra = xp.linalg.qr(up(a.mT, "float64"))
    u, s, vh = xp.linalg.svd(rb @ ra.mT, full_matrices=False)
    sign = -1.0 if scale < 0 else 1.0
    return SVD(down(qb @ (sign * u), dtype_name(b)), abs(scale) * s, down(vh @ qa.mT, dtype_name(b)))


def singular_values(b: Leaf | Array, a: Leaf | Array, *, scale: float = 1.0) -> Array:
    """Return all min(R, m, n) singular values of ``scale * b @ a`` in fp64, descending.

    fp64 Gram matrices where these give every value to a relative 1e-8, QR otherwise (then to a few eps s_1).
    """
    b, a = checked_factors(b, a, scale)
    found = spectra([(b, a)], [scale], FP64)
    if 1e8 * float(found.noise[0]) <= float(found.s[0, -1]) ** 2 < inf:
        return found.s[0, :]
    return svd(b, a, scale=scale).s


def frobenius(b: Leaf | Array, a: Leaf | Array, *, scale: float = 1.0) -> float:
    """Return ``|scale * b @ a|_F`` in O((m + n) R^2), right to 1e-6 also where the product nearly cancels."""
    b, a = checked_factors(b, a, scale)
    xp = namespace(b, a)
    gb, ga = grams(b, a, dtype_name(b))
    with overflow_checked():
        squared, size = float(xp.sum(gb * ga)), float(xp.sum(xp.abs(gb * ga)))
    if 1e-25 < size < 1e35 and squared > 0.1 * size:
        return abs(scale) * sqrt(squared)
    values = singular_values(b, a, scale=scale)
    largest = float(values[0])
    return largest * float(xp.linalg.vector_norm(values / largest)) if largest else 0.0


def inner(b1: Leaf | Array, a1: Leaf | Array, b2: Leaf | Array, a2: Leaf | Array) -> float:
    """Return ``<b1 a1, b2 a2>_F = sum((b1^T b2) * (a1 a2^T))`` in O((m + n) r1 r2).

    fp32 products (fp64 if an input is, or lies near the ends of fp32) with fp64 sums: absolute error about
    1e-7 |b1| |a1| |b2| |a2|. Raises NumericsError for values that are not finite.
    """
    b1, a1 = checked_factors(b1, a1)
    b2, a2 = checked_factors(b2, a2)
    if (b1.shape[0], a1.shape[1]) != (b2.shape[0], a2.shape[1]):
        raise UsageError("products of different shapes", expected=(b1.shape[0], a1.shape[1]))
    dtype = "float32" if all(map(_short, (b1, a1, b2, a2))) else "float64"
    with overflow_checked():
        value = float(namespace(b1, b2).sum(cross(b1, b2, dtype) * cross(a1.mT, a2.mT, dtype)))
    if not isfinite(value):
        raise NumericsError("a factor is not finite")
    return value


def _short(x: Array) -> bool:
    """Tell whether products of entries of ``x`` may be summed in fp32: they are not fp64, and far from its ends."""
    xp = namespace(x)
    return dtype_name(x) == "float32" and 1e-12 < max(float(xp.max(x)), -float(xp.min(x))) < 1e15


def checked_factors(b: Leaf | Array, a: Leaf | Array, scale: float = 1.0) -> tuple[Array, Array]:
    """Return both factors in one compute dtype, after the checks that every function here needs."""
    if len(b.shape) != 2 or len(a.shape) != 2 or b.shape[1] != a.shape[0] or 0 in (*b.shape, *a.shape):
        raise UsageError(
            "factors do not fit", expected="b (m, r), a (r, n), r >= 1", got=(tuple(b.shape), tuple(a.shape))
        )
    if not isfinite(scale):
        raise NumericsError("the scale is not finite", got=scale)
    dtype = working_dtype(b, a)
    return up(b, dtype), up(a, dtype)


def capped(choose: Choose) -> Choose:
    """Return ``choose`` with its answer checked and capped at the number of singular values."""

    def within(s: Array) -> int:
        k = int(choose(s))
        if k < 1:
            raise UsageError("a rank must be positive", expected=f"1 to {s.shape[0]}", got=k)
        return min(k, int(s.shape[0]))

    return within


class _Product(NamedTuple):
    """``scale * b @ a`` in its compute dtype, and how to choose its rank."""

    b: Array
    a: Array
    scale: float
    choose: Choose

    def may_square(self, precision: Precision) -> bool:
        """Tell whether Gram matrices of this precision, times the squared scale, may be right."""
        usual = self.scale == 0 or 1e-30 < abs(self.scale) < 1e30
        return usual and (precision is FP64 or dtype_name(self.b) != "float64")

    @property
    def form(self) -> Hashable:
        """What products must share to go through one batch."""
        return self.b.shape[1], min(*self.b.shape, *self.a.shape), dtype_name(self.b), type(self.b), device_of(self.b)


def _parts(pairs: Sequence[tuple[Leaf | Array, Leaf | Array]]) -> Iterator[slice]:
    """Yield stretches of at most ``TOGETHER`` entries, of at least one product; R x R work holds some twenty R^2."""
    start, held = 0, 0
    for i, pair in enumerate(pairs):
        size = sum(prod(x.shape) for x in pair) + 20 * pair[0].shape[-1] ** 2
        if i > start and held + size > TOGETHER:
            yield slice(start, i)
            start, held = i, 0
        held += size
    if pairs:
        yield slice(start, len(pairs))


def _truncated(
    pairs: Sequence[tuple[Leaf | Array, Leaf | Array]], scales: Sequence[float], chooses: Sequence[Choose]
) -> list[Truncation]:
    """Truncate products whose factors fit into memory together: first by Gram matrices, the rest by QR."""
    todo = {
        i: _Product(*checked_factors(*pair, scale), scale, capped(choose))
        for i, (pair, scale, choose) in enumerate(zip(pairs, scales, chooses, strict=True))
    }
    done: dict[int, Truncation] = {}
    for precision in (FP32, FP64):
        groups: dict[Hashable, list[int]] = {}
        for i, x in todo.items():
            if i not in done and x.may_square(precision):
                groups.setdefault(x.form, []).append(i)
        for places in groups.values():
            found = _by_grams([todo[i] for i in places], precision)
            done.update({i: result for i, result in zip(places, found, strict=True) if result is not None})
    return [done.get(i) or truncate_qr(x.b, x.a, x.choose, scale=x.scale) for i, x in todo.items()]


def _by_grams(group: Sequence[_Product], precision: Precision) -> list[Truncation | None]:
    """Truncate products of one form by Gram matrices; None where the result cannot be trusted."""
    found = spectra([(x.b, x.a) for x in group], [x.scale for x in group], precision)
    noise = [float(one) for one in found.noise.tolist()]
    ranks = [x.choose(found.s[i, :]) if noise[i] > 0 else 1 for i, x in enumerate(group)]
    fine = trusted(found.s, found.noise, ranks, [x.choose for x in group])
    kept = figures(found.s, ranks)
    route = f"gram{precision.dtype[-2:]}"
    out: list[Truncation | None] = []
    for i, x in enumerate(group):
        if noise[i] == 0:
            out.append(_zero(x.b, x.a, x.choose, route))
        elif not fine[i]:
            out.append(None)
        else:
            tall, wide = (down(core, precision.dtype) for core in balanced(found, i, ranks[i]))
            dtype, s = dtype_name(x.b), found.s[i, :]
            tall, wide = up(x.b, precision.dtype) @ tall, wide @ up(x.a, precision.dtype)
            out.append(Truncation(down(tall, dtype), down(wide, dtype), s, ranks[i], *kept[i], route))
    return out


def _zero(b: Array, a: Array, choose: Choose, route: str) -> Truncation:
    """Return the truncation of a zero product: zero columns, and orthonormal rows out of those of ``a``."""
    xp = namespace(b, a)
    s = xp.zeros(min(*b.shape, *a.shape), dtype=xp.float64, device=b.device)
    k = choose(s)
    rows = xp.linalg.qr(up(a[:k, :].mT, "float64"))[0].mT
    tall = xp.zeros((b.shape[0], k), dtype=b.dtype, device=b.device)
    return Truncation(tall, down(rows, dtype_name(b)), s, k, 1.0, 0.0, route)
