"""Gram matrices of factors of different shapes in one launch: X^T X for tall X, X X^T for wide X, (R, R) in fp64.

The work is a table of items (a stretch of one factor); products of a tile run on tensor cores (fp32: ordinary fp32
arithmetic), tiles are added in fp64, and stretches in a second launch in fixed order: nothing depends on timing.

Error of an entry against float64 of the stored values: a tile of BK values adds BK / 16 times in a truncating tensor
core, so at most (BK / 16) 2^-23 |x_i| |x_j| (:data:`NOISE` for BK = 64); fp32 rounds BK times, at most BK 2^-24, which
its rows of the table keep at 16: twice NOISE at worst, a quarter of it as roundings go.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from loratools.kernels.blocks import Blocks, options, pick
from loratools.kernels.target import FLOATS, VECTOR_BYTES, Tensor, by_rows, is_aligned, power_of_two, stretches, table
from loratools.kernels.tiles import mma

NOISE = 5e-7
"""Errors of a Gram matrix, relative to |x_i| |x_j|: 4 additions of at most one ulp of 2^-23."""


def grams_reference(factors: Sequence[Tensor], *, wide: Sequence[bool]) -> list[Tensor]:
    """Return the specification in float64: x^T x of every tall x (n, R), x x^T of every wide x (R, n)."""
    tall = [(x.mT if w else x).double() for x, w in zip(factors, wide, strict=True)]
    return [x.mT @ x for x in tall]


@triton.jit
def _grams(
    items: tl.tensor,
    out: tl.tensor,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    item = tl.program_id(0).to(tl.int64)
    x = tl.load(items + item * 6).to(tl.pointer_type(DTYPE))
    row = tl.load(items + item * 6 + 1)
    rank = tl.load(items + item * 6 + 2)
    is_wide = tl.load(items + item * 6 + 3)
    begin = tl.load(items + item * 6 + 4)
    end = tl.load(items + item * 6 + 5)
    if ALIGNED:
        x = tl.multiple_of(x, 16)
        row = tl.multiple_of(row, VECTOR)
        rank = tl.multiple_of(rank, VECTOR)
        begin = tl.multiple_of(begin, VECTOR)
        end = tl.multiple_of(end, VECTOR)
    r = tl.arange(0, BR)
    acc = tl.zeros((BR, BR), tl.float64)
    if is_wide != 0:
        for start in range(begin, end, BK):
            k = start + tl.arange(0, BK)
            tile = tl.load(x + r[:, None] * row + k[None, :], mask=(r[:, None] < rank) & (k[None, :] < end), other=0.0)
            acc += mma(tile, tl.trans(tile)).to(tl.float64)
    else:
        for start in range(begin, end, BK):
            k = start + tl.arange(0, BK)
            tile = tl.load(x + k[:, None] * row + r[None, :], mask=(k[:, None] < end) & (r[None, :] < rank), other=0.0)
            acc += mma(tl.trans(tile), tile).to(tl.float64)
    tl.store(out + item * BR * BR + r[:, None] * BR + r[None, :], acc)


@triton.jit
def _add_up(partial: tl.tensor, first: tl.tensor, out: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    matrix = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(first + matrix)
    end = tl.load(first + matrix + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for item in range(begin, end):
        total += tl.load(partial + item * SIZE + at)
    tl.store(out + matrix * SIZE + at, total)


def grams(factors: Sequence[Tensor], *, wide: Sequence[bool], blocks: Blocks | None = None) -> Tensor:
    """Return the Gram matrices (factors, P, P) in fp64, P the largest rank rounded up to a tile; zeros beyond a rank.

    ``factors`` of one dtype: tall (n, R) or, where ``wide``, (R, n). Two launches. NaN passes through as NaN.
    """
    xs = [by_rows(x) for x in factors]
    ranks = [x.shape[0] if w else x.shape[1] for x, w in zip(xs, wide, strict=True)]
    side = power_of_two(max(ranks))
    s = blocks or pick("gram", itemsize=xs[0].element_size(), rank=side)
    rows = [[x.data_ptr(), x.stride(0), rank, int(w)] for x, rank, w in zip(xs, ranks, wide, strict=True)]
    lengths = [x.shape[1] if w else x.shape[0] for x, w in zip(xs, wide, strict=True)]
    items, first = stretches(rows, lengths, s["STRETCH"])
    device = xs[0].device
    vector = VECTOR_BYTES // xs[0].element_size()
    aligned = all(map(is_aligned, xs)) and all(size % vector == 0 for size in (*ranks, *lengths, s["STRETCH"]))
    partial = torch.empty((len(items), side, side), dtype=torch.float64, device=device)
    _grams[(len(items),)](
        table(items, device), partial, DTYPE=FLOATS[xs[0].dtype], ALIGNED=aligned, VECTOR=vector, BR=side, BK=s["BK"],
        **options(s),
    )  # fmt: skip
    if len(items) == len(xs):
        return partial
    out = torch.empty((len(xs), side, side), dtype=torch.float64, device=device)
    _add_up[(len(xs), side * side // 256)](partial, table(first, device), out, SIZE=side * side, BLOCK=256)
    return out
