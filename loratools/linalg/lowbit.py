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
from math import pi

from loratools.leaf import Array
from loratools.linalg.levels import EVEN_BOOK, GAUSS_BOOK, HALF, nearest
from loratools.linalg.lowbit_state import How, Problem, State, assessed, gram_matrices, runs
from loratools.linalg.lowbit_steps import begun, swept
from loratools.linalg.namespace import device_of, down, namespace, up
from loratools.linalg.scales import spread

SWEEPS = 20  # at most
FIRST = 2  # sweeps that are not judged: the gain grows before it falls, as weak components find their new work
ENOUGH = 0.02  # a sweep that lowers the squared error by less than this share is the last


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
    for one, i, j in runs(bits):
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
    how = How(bits, group, book, "float64" if bits[0] > 4 else "float32")
    problem = Problem.of(up(b), up(a), None, how)
    best = _descended(problem, begun(problem, how), how, sweeps)
    if weights is not None:  # begun where the plain error ends: a better place than the components themselves
        problem = Problem.of(up(b), up(a), weights, how)
        grams = gram_matrices(problem, best.b, best.a, how)
        best = _descended(problem, assessed(problem, best.b, best.a, best.left, best.right, grams), how, sweeps)
    sides = (_side(problem.b, best.b, best.left, how), _side(problem.a, best.a, best.right, how))
    return LowBit(*sides, bits, group, book, best.error)


def _descended(problem: Problem, state: State, how: How, sweeps: int) -> State:
    """Return the best state of at most so many sweeps."""
    best = state
    for i in range(sweeps):
        state = swept(problem, state, how)
        before, best = best, state if state.error < best.error else best
        if i >= FIRST and before.error - state.error <= ENOUGH * before.error:
            break
    return best


def _side(x: Array, values: Array, scales: Array, how: How) -> Side:
    """Return the codes of values, which are levels times scales but for rounding."""
    xp, n = namespace(values), values.shape[1]
    size = spread(scales, n, how.group)
    codes = tuple(
        xp.zeros((j - i, 0), dtype=xp.uint8, device=device_of(x))
        if one == HALF
        else nearest(values[i:j, :] / xp.where(size == 0, 1.0, size)[i:j, :], one, how.book)
        for one, i, j in runs(how.bits)
    )
    return Side(codes, scales, down(x[: how.half, :], "float16"))
