"""Low-bit factors of a product D = b a: every component j a row of codes on each side, and fp16 scales.

The error that counts is |D - D'|_F, not that of the factors. Given one side, the other's codes are improved entry by
entry (coordinate descent on the exact objective, all rows at once), so that weak components learn to mend what strong
ones lost; the scales of the components are refitted by their normal equations. Both steps never raise the error, but
for the rounding of scales to fp16; the best state seen is returned.

Source of the parts: Lloyd 1982 and Max 1960 (levels), least-squares scales as in BitDelta (arXiv:2402.10193), balanced
SVD components as in LoRAQuant (arXiv:2510.26690); the alternation is that of additive quantisers (Babenko, Lempitsky
2014) on the two factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import pi
from typing import NamedTuple

from loratools.leaf import Array
from loratools.linalg.levels import EVEN_BOOK, GAUSS_BOOK, decoded, is_even, nearest, snapped
from loratools.linalg.namespace import device_of, down, namespace, up

HALF = 16  # "bits" of a component stored as plain fp16 values
SWEEPS = 20  # at most
BLOCK = 8  # components whose corrections are made one by one between two matrix products
TILE = 2048  # rows worked on at once, so that they stay in the cache
FIRST = 2  # sweeps that are not judged: the gain grows before it falls, as weak components find their new work
ENOUGH = 0.02  # a sweep that lowers the squared error by less than this share is the last
TINY = 2.0**-24  # the smallest fp16 number


@dataclass(frozen=True)
class Side:
    """One factor, transposed: ``codes`` per run of equal bits, ``scales`` fp32 (k, groups) that fp16 holds.

    The first h components (of HALF "bits") are ``raw`` values (h, n) in fp16, times their scale; their codes are idle.
    """

    codes: tuple[Array, ...]
    scales: Array
    raw: Array


@dataclass(frozen=True)
class LowBit:
    """Codes of both factors, ``bits`` per component (not ascending), ``error`` |D - D'|^2 / |D|^2 (weighted, if so)."""

    b: Side
    a: Side
    bits: tuple[int, ...]
    group: int
    book: int
    error: float


def encode(
    b: Array,
    a: Array,
    bits: Sequence[int],
    *,
    group: int = 0,
    book: int | None = None,
    weights: Array | None = None,
    rotate: bool = True,
    sweeps: int = SWEEPS,
) -> LowBit:
    """Return low-bit codes of balanced components b (m, k), a (k, n), the strongest first, in fp32.

    ``bits`` (k,), not ascending, 1 to 12 or HALF. ``group``: entries per scale along each vector (0: one for all).
    ``book``: the levels (default: those that begin better, where there are more than 4 bits). ``weights`` (n,), not
    negative, weigh the columns of D: then |(D - D') diag(weights)| is minimised. ``rotate``: begin also from components
    of equal bits mixed by a rotation, which leaves D as it is, and keep the better. Cost O((m + n) k^2) per sweep.
    """
    bits = tuple(bits)
    fine = any(4 < one < HALF for one in bits)
    books = (book,) if book is not None else (GAUSS_BOOK, EVEN_BOOK) if fine else (GAUSS_BOOK,)
    starts = [(b, a)]
    if rotate and len(bits) > 1 and bits[0] > 1:
        turn = _rotation(bits, b)
        starts.append((b @ turn, turn.mT @ a))
    tries = (_encode(*start, bits, group, one, weights, sweeps) for start in starts for one in books)
    return min(tries, key=lambda r: r.error)


def _rotation(bits: tuple[int, ...], like: Array) -> Array:
    """Return an orthogonal matrix (k, k) that mixes components of equal bits evenly: cosines (DCT-II) block by block.

    A component of weak and strong ones alike wastes no code on an energy that it lacks; below 2 bits it does not help.
    """
    xp, k = namespace(like), len(bits)
    out = xp.eye(k, dtype=like.dtype, device=device_of(like))
    for one, i, j in _runs(bits):
        n = j - i
        if one == HALF or n < 2:
            continue
        at = up(xp.arange(n, dtype=xp.float64, device=device_of(like)))
        wave = xp.cos((at[:, None] + 0.5) * at[None, :] * (pi / n)) * (2.0 / n) ** 0.5
        out[i:j, i:j] = xp.where(at[None, :] == 0, n**-0.5, wave)
    return out


def _encode(
    b: Array, a: Array, bits: tuple[int, ...], group: int, book: int, weights: Array | None, sweeps: int
) -> LowBit:
    how = _How(bits, group, book, "float64" if bits[0] > 4 else "float32")
    problem = _Problem.of(up(b), up(a), None, how)
    best = _descended(problem, _begun(problem, how), how, sweeps)
    if weights is not None:  # begun where the plain error ends: a better place than the components themselves
        problem = _Problem.of(up(b), up(a), weights, how)
        grams = _grams(problem, best.b, best.a, how)
        best = _descended(problem, _state(problem, best.b, best.a, best.left, best.right, grams), how, sweeps)
    sides = (_side(problem.b, best.b, best.left, how), _side(problem.a, best.a, best.right, how))
    return LowBit(*sides, bits, group, book, best.error)


def _descended(problem: _Problem, state: _State, how: _How, sweeps: int) -> _State:
    """Return the best state of at most so many sweeps."""
    best = state
    for i in range(sweeps):
        state = _swept(problem, state, how)
        before, best = best, state if state.error < best.error else best
        if i >= FIRST and before.error - state.error <= ENOUGH * before.error:
            break
    return best


class _How(NamedTuple):
    """What stays the same throughout; ``precision`` is that of Gram products: small errors are differences of these."""

    bits: tuple[int, ...]
    group: int
    book: int
    precision: str

    def gram(self, x: Array, y: Array) -> Array:
        """Return x y^T (k, k) in fp64."""
        return up(up(x, self.precision) @ up(y, self.precision).mT, "float64")

    @property
    def half(self) -> int:
        """How many components are stored as plain values."""
        return sum(1 for one in self.bits if one == HALF)


class _Problem(NamedTuple):
    """D = b^T a with b (k, m), a (k, n) and squared weights on the columns; ``square`` is the weighted |D|^2."""

    b: Array
    a: Array
    weights: Array | None
    square: float

    @classmethod
    def of(cls, b: Array, a: Array, weights: Array | None, how: _How) -> _Problem:
        xp = namespace(b)
        tall = xp.asarray(b.mT, copy=True)
        weighted = None if weights is None else up(weights) ** 2
        found = cls(tall, a, weighted, 0.0)
        return found._replace(square=float(xp.sum(how.gram(tall, tall) * how.gram(found.weigh(a), a))))

    def weigh(self, x: Array) -> Array:
        """Return x (k, n) with squared weights on its columns."""
        return x if self.weights is None else x * self.weights


class _State(NamedTuple):
    """Values of both sides (k, m), (k, n), their scales (k, groups), Gram matrices and relative squared error.

    ``bb`` = b' b'^T, ``bd`` = b' b^T, and likewise for a: with them an error or a refit costs O(k^2).
    """

    b: Array
    a: Array
    left: Array
    right: Array
    bb: Array
    bd: Array
    aa: Array
    ad: Array
    error: float


def _state(problem: _Problem, b: Array, a: Array, left: Array, right: Array, grams: tuple[Array, ...]) -> _State:
    bb, bd, aa, ad = grams
    xp = namespace(bb)
    wrong = problem.square - 2 * float(xp.sum(bd * ad)) + float(xp.sum(bb * aa))
    error = max(wrong / problem.square, 0.0) if problem.square else 0.0
    return _State(b, a, left, right, bb, bd, aa, ad, error)


def _grams(problem: _Problem, b: Array, a: Array, how: _How) -> tuple[Array, ...]:
    seen = problem.weigh(a)
    return how.gram(b, b), how.gram(b, problem.b), how.gram(seen, a), how.gram(seen, problem.a)


def _runs(bits: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (bits, first, last + 1) of every stretch of components with equal bits."""
    out, start = [], 0
    for one, members in groupby(bits):
        stop = start + len(list(members))
        out.append((one, start, stop))
        start = stop
    return out


def _begun(problem: _Problem, how: _How) -> _State:
    """Return the nearest codes of the components, each side by itself, with least-squares scales."""
    (b, left), (a, right) = (_rounded(x, how) for x in (problem.b, problem.a))
    return _state(problem, b, a, left, right, _grams(problem, b, a, how))


def _rounded(x: Array, how: _How) -> tuple[Array, Array]:
    xp, n = namespace(x), x.shape[1]
    values, scales = [], []
    for one, i, j in _runs(how.bits):
        rows = x[i:j, :]
        if one == HALF:
            values.append(_stored(rows))
            scales.append(xp.ones((j - i, groups(n, how.group)), dtype=xp.float32, device=device_of(x)))
            continue
        scale = _first_scale(rows, one, how)
        for _ in range(1 if one == 1 else 3):
            spread = _spread(xp.where(scale == 0, TINY, scale), n, how.group)
            level = decoded(nearest(rows / spread, one, how.book), one, how.book)
            scale = _fitted(rows, level, how.group, scale)
        scale = _stored(scale)
        values.append(level * _spread(scale, n, how.group))
        scales.append(scale)
    return xp.concat(values), xp.concat(scales)


def groups(n: int, group: int) -> int:
    """Return how many scales a vector of n entries has."""
    return -(-n // group) if group else 1


def _stored(x: Array) -> Array:
    """Return numbers as fp16 holds them, in fp32; the smallest ones do not vanish."""
    xp = namespace(x)
    return up(down(xp.where(x == 0, 0.0, xp.copysign(xp.clip(xp.abs(x), TINY, 65504.0), x)), "float16"))


def _spread(scale: Array, n: int, group: int) -> Array:
    """Return scales (k, groups) for every entry: (k, 1) or (k, n)."""
    return namespace(scale).repeat(scale, group, axis=1)[:, :n] if group else scale


def _grouped(x: Array, group: int) -> Array:
    """Return sums of x (k, n) by group: (k, groups)."""
    xp, (k, n) = namespace(x), x.shape
    if not group:
        return xp.sum(x, axis=1, keepdims=True)
    pad = groups(n, group) * group - n
    x = xp.concat([x, xp.zeros((k, pad), dtype=x.dtype, device=device_of(x))], axis=1) if pad else x
    return xp.sum(x.reshape(k, -1, group), axis=2)


def _first_scale(x: Array, bits: int, how: _How) -> Array:
    """Return the root mean square, or for even levels the largest magnitude over the outermost level."""
    xp = namespace(x)
    size = xp.sqrt(_grouped(x * x, how.group) / _grouped(xp.ones_like(x), how.group)) + TINY
    if not is_even(bits, how.book):
        return size
    ratio = xp.abs(x) / _spread(size, x.shape[1], how.group)
    return size * xp.max(ratio, axis=1, keepdims=True) / ((1 << (bits - 1)) - 0.5)


def _fitted(x: Array, level: Array, group: int, before: Array) -> Array:
    """Return the least-squares scale <x, level> / <level, level> of every group."""
    xp = namespace(x)
    top, bottom = _grouped(x * level, group), _grouped(level * level, group)
    return xp.where(bottom > 0, top / xp.where(bottom > 0, bottom, 1.0), before)


def _swept(problem: _Problem, state: _State, how: _How) -> _State:
    """Improve the codes of b given a, those of a given b, then the scales of the components."""
    b = _improved(state.b, state.left, up(state.ad) @ problem.b, up(state.aa), how)
    bb, bd = how.gram(b, b), how.gram(b, problem.b)
    a = _improved(state.a, state.right, up(bd) @ problem.a, up(bb), how)
    seen = problem.weigh(a)
    return _refitted(problem, b, a, state, (bb, bd, how.gram(seen, a), how.gram(seen, problem.a)), how)


def _improved(values: Array, scales: Array, target: Array, gram: Array, how: _How) -> Array:
    """Return values (k, n) that lower x^T gram x - 2 x^T target in every column: one pass over the components.

    ``target`` (k, n) and ``gram`` (k, k) are the linear and the quadratic term; what is stored plainly stays.
    """
    xp, (k, n) = namespace(values), values.shape
    spread = _spread(scales, n, how.group)
    wide = spread.shape[1] > 1
    diagonal = [float(gram[j, j]) for j in range(k)]
    done = []
    for start in range(0, n, TILE):
        part = slice(start, min(start + TILE, n))
        now, goal = xp.asarray(values[:, part], copy=True), target[:, part]
        scale = spread[:, part] if wide else spread
        for i in range(how.half, k, BLOCK):
            stop = min(i + BLOCK, k)
            rest = goal[i:stop, :] - gram[i:stop, :] @ now
            for j in range(i, stop):
                if diagonal[j] <= 0:
                    continue
                old = now[j, :]
                new = _best(rest[j - i, :] + diagonal[j] * old, scale[j, :], diagonal[j], how.bits[j], how.book)
                if j + 1 < stop:
                    rest[j + 1 - i :, :] -= gram[j + 1 : stop, j][:, None] * (new - old)
                now[j, :] = new
        done.append(now)
    return xp.concat(done, axis=1)


def _best(pull: Array, scale: Array, weight: float, bits: int, book: int) -> Array:
    """Return the values nearest to pull / weight among the levels times scale."""
    xp = namespace(pull)
    if bits == 1:
        return xp.copysign(scale, pull)
    wanted = pull / (weight * xp.where(scale == 0, TINY, scale))
    return snapped(wanted, bits, book) * scale


def _refitted(problem: _Problem, b: Array, a: Array, old: _State, grams: tuple[Array, ...], how: _How) -> _State:
    """Return the state with a factor on every component, the least-squares one, split between both sides.

    c solves (b'b'^T o a'a'^T) c = diag(b' D a'^T); a tiny ridge keeps it solvable.
    """
    bb, bd, aa, ad = grams
    xp = namespace(bb)
    quadratic, linear, k = bb * aa, xp.sum(bd * ad, axis=1), bb.shape[0]
    ridge = 1e-9 * float(xp.sum(xp.linalg.diagonal(quadratic))) / k + 1e-300
    eye = xp.eye(k, dtype=quadratic.dtype, device=device_of(quadratic))
    factor = xp.linalg.solve(quadratic + ridge * eye, linear)
    root = up(xp.sqrt(xp.abs(factor)))[:, None]
    left = _stored(old.left * root * up(xp.where(factor < 0, -1.0, 1.0))[:, None])
    right = _stored(old.right * root)
    one, two = _ratio(left, old.left), _ratio(right, old.right)
    b, a = b * _spread(one, b.shape[1], how.group), a * _spread(two, a.shape[1], how.group)
    if how.group:
        return _state(problem, b, a, left, right, _grams(problem, b, a, how))
    f, g = up(one, "float64"), up(two, "float64")
    return _state(problem, b, a, left, right, (bb * f * f.mT, bd * f, aa * g * g.mT, ad * g))


def _ratio(new: Array, old: Array) -> Array:
    xp = namespace(new)
    return new / xp.where(old == 0, 1.0, old)


def _side(x: Array, values: Array, scales: Array, how: _How) -> Side:
    """Return the codes of values, which are levels times scales but for rounding."""
    xp, n = namespace(values), values.shape[1]
    spread = _spread(scales, n, how.group)
    codes = tuple(
        xp.zeros((j - i, 0), dtype=xp.uint8, device=device_of(x))
        if one == HALF
        else nearest(values[i:j, :] / xp.where(spread == 0, 1.0, spread)[i:j, :], one, how.book)
        for one, i, j in _runs(how.bits)
    )
    return Side(codes, scales, down(x[: how.half, :], "float16"))
