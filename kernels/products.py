"""Products of dense matrices with a thin block, Y = D X and Z = D^T Y, D as stored: ``d``, or ``tuned - base``.

The subtraction happens in the tile, in fp32, and is never written; the test matrix of a sketch is made in the tile. The
thin block comes as bf16 terms: three hold all bits of fp32 (full precision), two suffice between power iterations,
where errors of 2^-16 only turn the block a little; a sketch's signs are one exact term. The matrix is bf16 (one exact
term), fp16 (two) or fp32 or a difference (as many as the block has).

A sketch makes its signs in the tile (``fused``) or reads those that a launch before it made, bit for bit the same: ten
rounds of Philox for every row tile are some 3000 cycles of a processor's integer units per 64 x 32 signs, as long as
28 KB of D take to arrive, so that tiles of fewer than 256 rows read them from L2 by default.

Bytes of D are the floor while 2 l terms flop per element stay below the balance of the machine: l = 26 columns in three
terms are 96 flop per byte of bf16, half of what an H200 balances at.

Error of an entry, full precision: tiles of BK = 64 add at most 6 x 4 times in a truncating tensor core and are added to
nearest, so at most (24 2^-23 + n / 64 2^-24) |d_i| |x_j|, in practice a few 2^-24.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from loratools.kernels.blocks import Blocks, options, pick
from loratools.kernels.philox import packed, signs, signs_reference, signs_tile
from loratools.kernels.spelled import TERMS
from loratools.kernels.target import FLOATS, Tensor, is_aligned, power_of_two, table
from loratools.kernels.tiles import narrow, plus, split_product
from loratools.linalg.seeds import Key


def times_reference(d: Tensor, base: Tensor | None, x: Tensor) -> Tensor:
    """Return the specification of Y in float64: d (m, n), or d - base, times x (n, l)."""
    return (d.double() - (0 if base is None else base.double())) @ x.double()


def sketch_reference(d: Tensor, base: Tensor | None, key: Key, width: int) -> Tensor:
    """Return the specification of a sketch in float64: the product with the CPU's own test matrix."""
    return times_reference(d, base, signs_reference(key, d.shape[1], width).to(d.device))


@triton.jit
def _tile(
    d: tl.tensor, base: tl.tensor, at: tl.tensor, base_at: tl.tensor, mask: tl.tensor, MINUS: tl.constexpr
) -> tl.tensor:
    tile = tl.load(d + at, mask=mask, other=0.0)
    if MINUS:
        tile = tile.to(tl.float32) - tl.load(base + base_at, mask=mask, other=0.0).to(tl.float32)
    return tile


@triton.jit
def _product(
    sources: tl.tensor,
    block: tl.tensor,
    out: tl.tensor,
    long: tl.tensor,
    deep: tl.tensor,
    width: tl.tensor,
    batch_count: tl.tensor,
    DTYPE: tl.constexpr,
    BASE: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    MINUS: tl.constexpr,
    TURNED: tl.constexpr,
    SKETCH: tl.constexpr,
    D_TERMS: tl.constexpr,
    X_TERMS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BL: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    # long: rows of the result; deep: what is summed over. TURNED: the matrix is stored (deep, long).
    batch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    d = tl.load(sources + batch * 4).to(tl.pointer_type(DTYPE))
    base = tl.load(sources + batch * 4 + 1).to(tl.pointer_type(BASE))
    row = tl.load(sources + batch * 4 + 2)
    base_row = tl.load(sources + batch * 4 + 3)
    if ALIGNED:
        d = tl.multiple_of(d, 16)
        base = tl.multiple_of(base, 16)
        row = tl.multiple_of(row, VECTOR)
        base_row = tl.multiple_of(base_row, VECTOR)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    l = tl.arange(0, BL)  # noqa: E741
    is_i = i < long
    acc = tl.zeros((BM, BL), tl.float32)
    each = tl.cdiv(tl.cdiv(deep, BK), SPLITS) * BK
    for start in range(split * each, min((split + 1) * each, deep), BK):
        k = start + tl.arange(0, BK)
        is_k = k < deep
        if TURNED:
            place, base_place = (
                k[:, None].to(tl.int64) * row + i[None, :],
                k[:, None].to(tl.int64) * base_row + i[None, :],
            )
            tile = tl.trans(_tile(d, base, place, base_place, is_k[:, None] & is_i[None, :], MINUS))
        else:
            place, base_place = (
                i[:, None].to(tl.int64) * row + k[None, :],
                i[:, None].to(tl.int64) * base_row + k[None, :],
            )
            tile = _tile(d, base, place, base_place, is_i[:, None] & is_k[None, :], MINUS)
        if SKETCH:
            x1 = signs_tile(k, l, tl.load(block + batch))
            part = split_product(tile, x1, x1, x1, D_TERMS, 1)
        else:
            at = (batch * X_TERMS * deep + k[:, None]) * BL + l[None, :]
            x1 = tl.load(block + at, mask=is_k[:, None], other=0.0)
            x2, x3 = x1, x1
            if X_TERMS >= 2:
                x2 = tl.load(block + at + tl.cast(deep, tl.int64) * BL, mask=is_k[:, None], other=0.0)
            if X_TERMS >= 3:
                x3 = tl.load(block + at + tl.cast(deep, tl.int64) * 2 * BL, mask=is_k[:, None], other=0.0)
            part = split_product(tile, x1, x2, x3, D_TERMS, X_TERMS)
        acc = plus(acc, part)
    to = ((split * batch_count + batch) * long + i[:, None]) * width + l[None, :]
    tl.store(out + to, acc, mask=is_i[:, None] & (l[None, :] < width))


@triton.jit
def _terms(
    x: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    X_TERMS: tl.constexpr,
    BM: tl.constexpr,
    BL: tl.constexpr,
) -> None:
    batch = tl.program_id(1).to(tl.int64)
    i, l = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BL)  # noqa: E741
    inside = i[:, None] < rows
    at = (batch * rows + i[:, None]) * width + l[None, :]
    rest = tl.load(x + at, mask=inside & (l[None, :] < width), other=0.0).to(tl.float32)
    for term in tl.static_range(X_TERMS):
        piece = narrow(rest)
        tl.store(out + ((batch * X_TERMS + term) * rows + i[:, None]) * BL + l[None, :], piece, mask=inside)
        rest = rest - piece.to(tl.float32)


def terms(x: Tensor, count: int) -> Tensor:
    """Return x (batch, n, l) fp32 as bf16 terms, (batch, count, n, L); L is l rounded up to a tile, with zeros."""
    batch, rows, width = x.shape
    side = power_of_two(width)
    out = torch.empty((batch, count, rows, side), dtype=torch.bfloat16, device=x.device)
    grid = (triton.cdiv(rows, 64), batch)
    _terms[grid](x.contiguous(), out, rows, width, X_TERMS=count, BM=64, BL=side)
    return out


class Matrices:
    """A batch of equally shaped matrices in memory, ``ds`` or ``ds - bases``: addresses, nothing copied."""

    def __init__(self, ds: Sequence[Tensor], bases: Sequence[Tensor] | None = None) -> None:
        self.ds, self.bases = list(ds), None if bases is None else list(bases)
        self.shape: tuple[int, int] = tuple(self.ds[0].shape)
        self.device = self.ds[0].device
        pairs = list(zip(self.ds, self.bases or self.ds, strict=True))
        self.sources = table([[d.data_ptr(), b.data_ptr(), d.stride(0), b.stride(0)] for d, b in pairs], self.device)
        self.aligned = all(map(is_aligned, [x for pair in pairs for x in pair]))

    def sketch(self, keys: Sequence[Key], width: int, *, blocks: Blocks | None = None) -> Tensor:
        """Return D times the test matrices of the keys, (batch, m, width) fp32."""
        s = blocks or self.blocks("sketch")
        if not s["fused"]:
            made = signs(list(keys), self.shape[1], power_of_two(width), self.device)
            return self._run(made[:, None], width, turned=False, sketch=False, blocks=s)
        return self._run(packed(list(keys), self.device), width, turned=False, sketch=True, blocks=s)

    def times(self, x: Tensor, *, count: int = 3, blocks: Blocks | None = None) -> Tensor:
        """Return D x (batch, m, l) in fp32: x (batch, n, l) in fp32, entering as ``count`` bf16 terms."""
        return self._run(
            terms(x, count), x.shape[-1], turned=False, sketch=False, blocks=blocks or self.blocks("times")
        )

    def turned_times(self, y: Tensor, *, count: int = 3, blocks: Blocks | None = None) -> Tensor:
        """Return D^T y (batch, n, l) in fp32: y (batch, m, l) in fp32, entering as ``count`` bf16 terms."""
        return self._run(
            terms(y, count), y.shape[-1], turned=True, sketch=False, blocks=blocks or self.blocks("turned")
        )

    def blocks(self, kernel: str) -> Blocks:
        """Return the table's blocks for this batch: of ``sketch``, ``times`` or ``turned``."""
        return pick(kernel, minus=int(self.bases is not None), itemsize=self.ds[0].element_size(), batch=len(self.ds))

    def _run(self, block: Tensor, width: int, *, turned: bool, sketch: bool, blocks: Blocks) -> Tensor:
        (m, n), s, count = self.shape, blocks, len(self.ds)
        long, deep = (n, m) if turned else (m, n)
        x_terms = 1 if sketch else block.shape[1]
        out = torch.empty((s["SPLITS"], count, long, width), dtype=torch.float32, device=self.device)
        _product[(triton.cdiv(long, s["BM"]), count, s["SPLITS"])](
            self.sources, block, out, long, deep, width, count,
            DTYPE=FLOATS[self.ds[0].dtype], BASE=FLOATS[(self.bases or self.ds)[0].dtype], ALIGNED=self.aligned,
            VECTOR=16 // max(x.element_size() for x in (self.ds[0], (self.bases or self.ds)[0])),
            MINUS=self.bases is not None, TURNED=turned, SKETCH=sketch, D_TERMS=self._d_terms(x_terms, sketch=sketch),
            X_TERMS=x_terms, BM=s["BM"], BK=s["BK"], BL=power_of_two(width), SPLITS=s["SPLITS"],
            **options(s),
        )  # fmt: skip
        return out[0] if s["SPLITS"] == 1 else out.double().sum(0).float()

    def _d_terms(self, x_terms: int, *, sketch: bool) -> int:
        """Return how many bf16 terms of the matrix enter: all it has; of fp32 what the block has (a sketch: 2)."""
        exact = TERMS[self.ds[0].dtype] if self.bases is None else 3
        return min(exact, 2 if sketch else max(x_terms, 2)) if exact == 3 else exact


def split_counts(power: int) -> tuple[list[int], int]:
    """Return the terms of the products D x after each power step, and those of the last projection: full at the end."""
    return [2] * (power - 1) + [3] * min(power, 1), 3


def dtypes(op: Any) -> tuple[torch.dtype, ...]:
    """Return the storage dtypes of a matrix or a difference."""
    return tuple(x.dtype for x in (op.like, getattr(op, "base", None)) if x is not None)
