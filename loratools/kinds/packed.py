"""Packed: a low-rank update in few bits; its factors are unpacked when they are used."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple, Self

from loratools.core import generic
from loratools.core.routes import route
from loratools.core.rows import Rows, rowwise
from loratools.core.update import Array, Delta, Leaf, Update, kind, namespace, shape_of
from loratools.errors import FormatError
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.linalg.bits import pack, row_bytes, unpack_from, unpack_levels
from loratools.linalg.factored import SVD, truncate
from loratools.linalg.levels import BITS, EVEN_BOOK, GAUSS_BOOK, levels
from loratools.linalg.lowbit import HALF, LowBit, encode, groups
from loratools.linalg.namespace import device_of, down, up


class Run(NamedTuple):
    """A stretch of components with equal bits, and where its parts begin: codes in bytes, scales in numbers."""

    bits: int
    number: int
    codes: tuple[int, int]
    scales: tuple[int, int]


@kind("packed")
class Packed(Delta):
    """D = sum over components j of b_j a_j^T; every vector is level[code] * scale.

    ``runs`` says bits, count, bits, count, ... of the components in their order; 16 bits are plain fp16 values. Of each
    run the codes hold first the vectors of b, then those of a, each vector beginning a byte, code i in bits i * b
    onwards, little end first; the scales likewise, one per vector or per ``group`` of entries. ``book`` names the
    levels (:mod:`loratools.linalg.levels`: 0 Gaussian, 1 evenly spaced; even above 8 bits). Decoding is a product of
    two fp32 numbers per entry, so it gives the same bits everywhere. Raises :class:`FormatError` where sizes disagree.
    """

    codes: Leaf | Array
    scales: Leaf | Array
    runs: tuple[int, ...]
    shape: tuple[int, ...]
    group: int = 0
    book: int = GAUSS_BOOK

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "runs", tuple(int(n) for n in self.runs))
        if len(self.runs) % 2 or any(b not in (*BITS, HALF) for b in self.runs[::2]) or 0 in self.runs[1::2]:
            raise FormatError("the runs of a packed update are broken", expected="bits, count, ...", got=self.runs)
        if self.book not in (GAUSS_BOOK, EVEN_BOOK) or len(self.shape) < 2:
            raise FormatError("a packed update of unknown levels or without columns", got=(self.book, self.shape))
        sizes = packed_sizes(self.runs, *self.matrix_shape, self.group)
        found = (*shape_of(self.codes), *shape_of(self.scales))
        if found != sizes:
            raise FormatError("codes and scales of a packed update do not fit", expected=sizes, got=found)

    @property
    def rank(self) -> int:
        """Number of stored components."""
        return sum(self.runs[1::2])

    def unpacked(self, dtype: str = "float32") -> LowRank:
        """Return the factors as leaves that unpack when read; without components, a zero column and row.

        Narrower dtypes than fp32 hold the fp32 values rounded once.
        """
        m, n = self.matrix_shape
        k = max(self.rank, 1)
        b = Leaf((k, m), dtype, lambda out: self._side(0, dtype)).T
        return LowRank(b, Leaf((k, n), dtype, lambda out: self._side(1, dtype)), 1.0, self.shape)

    def _side(self, side: int, dtype: str) -> Array:
        """Return one factor, transposed for b: (k, size)."""
        size = self.matrix_shape[side]
        codes, scales = (t.read() if isinstance(t, Leaf) else t for t in (self.codes, self.scales))
        xp = namespace(codes)
        runs = laid_out(self.runs, *self.matrix_shape, self.group)
        parts = [self._part(run, side, size, codes, scales, dtype) for run in runs]
        if not parts:
            return down(xp.zeros((1, size), dtype=xp.float32, device=device_of(codes)), dtype)
        return parts[0] if len(parts) == 1 else xp.concat(parts)

    def _part(self, run: Run, side: int, size: int, codes: Array, scales: Array, dtype: str) -> Array:
        xp, per = namespace(codes), groups(size, self.group)
        at, width = run.codes[side], vector_bytes(size, run.bits)
        block = codes[at : at + run.number * width]
        scale = up(scales[run.scales[side] : run.scales[side] + run.number * per]).reshape(run.number, per)
        if run.bits == HALF:
            value = up(xp.asarray(block, copy=True).view(xp.float16)).reshape(run.number, size)
        elif not self.group:  # few different values: they are scaled and rounded before they are looked up
            table = down(levels(run.bits, self.book, codes)[None, :] * scale, dtype)
            return unpack_from(table, block.reshape(run.number, width), run.bits, size)
        else:
            value = unpack_levels(block.reshape(run.number, width), run.bits, size, self.book)
        return down(value * (xp.repeat(scale, self.group, axis=1)[:, :size] if self.group else scale), dtype)

    def matmul(self, x: Array) -> Array:
        """Return b (a x); O((m + n) r k) beside unpacking."""
        return self.unpacked().matmul(x)

    def rmatmul(self, y: Array) -> Array:
        """Return a^T (b^T y); O((m + n) r k) beside unpacking."""
        return self.unpacked().rmatmul(y)

    def dense(self) -> Array:
        """Return D in ``shape``."""
        return self.unpacked().dense()

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 7 update: one component of 4 bits, two of 1 bit."""
        low = LowRank.example(seed)
        found = truncate(low.b, low.a, lambda s: 3, scale=low.scale)
        made = packed(encode(found.b, found.a, (4, 1, 1)), low.shape)
        return cls(made.codes, made.scales, made.runs, made.shape)


def vector_bytes(size: int, bits: int) -> int:
    """Return the bytes of one vector's codes."""
    return row_bytes(size, bits)


def laid_out(runs: tuple[int, ...], m: int, n: int, group: int) -> Iterator[Run]:
    """Yield every run with the places of its parts."""
    code = scale = 0
    for bits, count in zip(runs[::2], runs[1::2], strict=True):
        codes = code, code + count * vector_bytes(m, bits)
        scales = scale, scale + count * groups(m, group)
        yield Run(bits, count, codes, scales)
        code, scale = codes[1] + count * vector_bytes(n, bits), scales[1] + count * groups(n, group)


def packed_sizes(runs: tuple[int, ...], m: int, n: int, group: int) -> tuple[int, int]:
    """Return how many bytes of codes and how many scales an update has."""
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    codes = sum(count * (vector_bytes(m, bits) + vector_bytes(n, bits)) for bits, count in pairs)
    return codes, sum(count * (groups(m, group) + groups(n, group)) for _, count in pairs)


def runs_of(bits: tuple[int, ...]) -> tuple[int, ...]:
    """Return bits, count, bits, count, ... of components in their order."""
    out: list[int] = []
    for one in bits:
        if out and out[-2] == one:
            out[-1] += 1
        else:
            out += [one, 1]
    return tuple(out)


def packed(found: LowBit, shape: tuple[int, ...]) -> Packed:
    """Return the update of an encoding."""
    xp = namespace(found.b.scales)
    runs = runs_of(found.bits)
    codes, scales, at = [], [], 0
    for i, (bits, count) in enumerate(zip(runs[::2], runs[1::2], strict=True)):
        for side in (found.b, found.a):
            if bits == HALF:
                codes.append(side.raw[at : at + count, :].reshape(-1).view(xp.uint8))
            else:
                codes.append(pack(side.codes[i], bits).reshape(-1))
            scales.append(down(side.scales[at : at + count, :].reshape(-1), "float16"))
        at += count
    return Packed(xp.concat(codes), xp.concat(scales), runs, shape, found.group, found.book)


def empty(like: Array, shape: tuple[int, ...]) -> Packed:
    """Return the packed zero update."""
    xp = namespace(like)
    codes, scales = (xp.zeros(0, dtype=dtype, device=device_of(like)) for dtype in (xp.uint8, xp.float16))
    return Packed(codes, scales, (), shape)


@low_rank.register(Packed)
def _(u: Packed) -> LowRank:
    return u.unpacked()


@generic.svd.register(Packed)
def _(u: Packed, k: int, *, seed: int = 0) -> SVD:
    return generic.svd(u.unpacked(), k, seed=seed)


@generic.svdvals.register(Packed)
def _(u: Packed) -> Array:
    return generic.svdvals(u.unpacked())


@generic.inner.register(Packed)
def _(u: Packed, v: Delta) -> float:
    return generic.inner(u.unpacked(), v)


@route(Packed, LowRank)
def _unpack(u: Packed) -> Update:
    return u.unpacked()


@rowwise.register(Packed)
def _(u: Packed) -> Rows | None:
    return rowwise(u.unpacked())


def payload_bytes(runs: tuple[int, ...], shape: tuple[int, ...], group: int) -> int:
    """Return the bytes of codes and scales."""
    codes, scales = packed_sizes(runs, shape[0], prod(shape[1:]), group)
    return codes + 2 * scales
