"""Packed: a low-rank update in few bits; its factors are unpacked when they are used."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple, Self

from loratools.core.routes import route
from loratools.core.update import Array, Leaf, kind, namespace, shape_of
from loratools.errors import FormatError
from loratools.kinds.coded import Coded, unpacked
from loratools.kinds.lowrank import LowRank
from loratools.linalg.bits import pack, row_bytes
from loratools.linalg.factored import truncate
from loratools.linalg.levels import BITS, EVEN_BOOK, GAUSS_BOOK, HALF
from loratools.linalg.lowbit import LowBit, encode
from loratools.linalg.namespace import device_of, down, up
from loratools.linalg.scales import groups
from loratools.linalg.unpacking import values


class Run(NamedTuple):
    """A stretch of components with equal bits, and where its parts begin: codes in bytes, scales in numbers."""

    bits: int
    number: int
    codes: tuple[int, int]
    scales: tuple[int, int]


@kind("packed")
class Packed(Coded):
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
        xp, out = namespace(codes), None
        for at, part in self._parts(side, size, codes, scales, dtype):
            if out is None:
                out = xp.empty((self.rank, size), dtype=part.dtype, device=device_of(codes))
            out[at : at + part.shape[0], :] = part
        return down(xp.zeros((1, size), dtype=xp.float32, device=device_of(codes)), dtype) if out is None else out

    def _parts(
        self, side: int, size: int, codes: Array, scales: Array, dtype: str
    ) -> Iterator[tuple[int, Array]]:  # fmt: skip
        """Yield (first component, values) of one factor, block by block."""
        at, per = 0, groups(size, self.group)
        for run in laid_out(self.runs, *self.matrix_shape, self.group):
            begin, width = run.codes[side], row_bytes(size, run.bits)
            packed = codes[begin : begin + run.number * width].reshape(run.number, width)
            scale = up(scales[run.scales[side] : run.scales[side] + run.number * per]).reshape(run.number, per)
            found = values(packed, scale, run.bits, size, group=self.group, book=self.book, dtype=dtype)
            yield from ((at + i, part) for i, part in found)
            at += run.number

    @classmethod
    def example(cls, seed: int) -> Self:
        """A 5 x 7 update: one component of 4 bits, two of 1 bit."""
        low = LowRank.example(seed)
        found = truncate(low.b, low.a, lambda s: 3, scale=low.scale)
        made = packed(encode(found.b, found.a, (4, 1, 1)), low.shape)
        return cls(made.codes, made.scales, made.runs, made.shape)


def laid_out(runs: tuple[int, ...], m: int, n: int, group: int) -> Iterator[Run]:
    """Yield every run with the places of its parts."""
    code = scale = 0
    for bits, count in zip(runs[::2], runs[1::2], strict=True):
        codes = code, code + count * row_bytes(m, bits)
        scales = scale, scale + count * groups(m, group)
        yield Run(bits, count, codes, scales)
        code, scale = codes[1] + count * row_bytes(n, bits), scales[1] + count * groups(n, group)


def packed_sizes(runs: tuple[int, ...], m: int, n: int, group: int) -> tuple[int, int]:
    """Return how many bytes of codes and how many scales an update has."""
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    codes = sum(count * (row_bytes(m, bits) + row_bytes(n, bits)) for bits, count in pairs)
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


route(Packed, LowRank)(unpacked)


def payload_bytes(runs: tuple[int, ...], shape: tuple[int, ...], group: int) -> int:
    """Return the bytes of codes and scales."""
    codes, scales = packed_sizes(runs, shape[0], prod(shape[1:]), group)
    return codes + 2 * scales
