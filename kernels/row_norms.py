"""Row norms of W + s B A in one read of W: every tile of B A lives in registers only.

Flops 2 m n R, bytes m n of W: with fewer than about 200 columns of B (bf16, H200) the read of W is the floor, beyond it
the tensor cores are. Right for one adapter on a base; for several see :mod:`loratools.kernels.row_norms_shared`.

A tile reads (BM + BN) R of the factors out of L2, and BM BN of W: at R = 384 in bf16 tiles of 128 x 256 take 0.6 GB
through L2 for W of 8192 x 8192, those of 128 x 128 0.8 GB, beside 0.13 GB of W. W is asked for before the product of
its tile (EARLY), so that its latency passes meanwhile; a rank of at most BK needs no inner loop, and B stays where it
is for all tiles of a program (ONCE). fp32 factors enter as bf16 terms (:mod:`loratools.kernels.spelled`).

Error of a squared norm against float64 of the stored values, with u = 2^-24: an entry of B A errs by at most
(R / 16) 2u |s| sum_k |b_ik| |a_kj| (truncating tensor cores; R / 7 in place of R / 8 for fp32 factors), the sum
W + s B A rounds twice (2u of the sum), its square once, and BN squares are added by a tree in fp32 (log2 BN u) before
the tiles are added in fp64. So |error of a norm| <= (4 + log2(BN) / 2) u norm + (R / 8) u |s| | |b_i| |A| |. Up to
R = 384 that is under 2e-6 of the norm while |s| | |b_i| |A| | is at most half of it; in practice about 2e-7: errors of
products do not line up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from loratools.kernels.blocks import Blocks, options, pick
from loratools.kernels.spelled import spelled
from loratools.kernels.target import Tensor, by_rows
from loratools.kernels.tiles import mma_onto


def direct_reference(w: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """Return the specification in float64: w (m, n), b (m, R), a (R, n) -> squared row norms (m,) of w + scale b a."""
    total = w.double() + scale * (b.double() @ a.double())
    return (total * total).sum(1)


@triton.jit
def _w_tile(places: tl.tensor, is_col: tl.tensor, EVEN: tl.constexpr) -> tl.tensor:
    if EVEN:
        return tl.load(places)
    return tl.load(places, mask=is_col, other=0.0)


@triton.jit
def _squares(
    w: tl.tensor,
    b: tl.tensor,
    a: tl.tensor,
    partial: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    rank: tl.tensor,
    w_row: tl.tensor,
    b_row: tl.tensor,
    a_row: tl.tensor,
    scale: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
    ONCE: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    tiles = tl.cdiv(n, BN)
    each = tl.cdiv(tiles, SPLITS)
    place = tl.minimum(rows, m - 1)[:, None].to(tl.int64)  # beyond the last row: read it again, store nothing
    k = tl.arange(0, BK)
    talls = b + place * b_row + k[None, :]
    total = tl.zeros((BM,), tl.float64)
    if ONCE:
        tall = tl.load(talls, mask=k[None, :] < rank, other=0.0)
    for tile in range(split * each, min((split + 1) * each, tiles)):
        cols = tile * BN + tl.arange(0, BN)
        is_col = cols[None, :] < n
        wides = a + k[:, None].to(tl.int64) * a_row + cols[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        if EARLY:
            base = _w_tile(w + place * w_row + cols[None, :], is_col, EVEN)
        if ONCE:
            wide = tl.load(wides, mask=(k[:, None] < rank) & is_col, other=0.0)
            acc = mma_onto(tall, wide, acc)
        else:
            for start in range(0, rank, BK):
                if EVEN:
                    tall, wide = tl.load(talls + start), tl.load(wides + start * tl.cast(a_row, tl.int64))
                else:
                    left = rank - start
                    tall = tl.load(talls + start, mask=k[None, :] < left, other=0.0)
                    wide = tl.load(
                        wides + start * tl.cast(a_row, tl.int64), mask=(k[:, None] < left) & is_col, other=0.0
                    )
                acc = mma_onto(tall, wide, acc)
        if not EARLY:
            base = _w_tile(w + place * w_row + cols[None, :], is_col, EVEN)
        x = base.to(tl.float32) + scale * acc
        total += tl.sum(x * x, axis=1).to(tl.float64)
    tl.store(partial + split.to(tl.int64) * m + rows, total, mask=rows < m)


@triton.jit
def _finish(partial: tl.tensor, out: tl.tensor, m: tl.tensor, SPLITS: tl.constexpr, BM: tl.constexpr) -> None:
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    total = tl.zeros((BM,), tl.float64)
    for split in range(SPLITS):
        total += tl.load(partial + split * tl.cast(m, tl.int64) + rows, mask=rows < m, other=0.0)
    tl.store(out + rows, tl.sqrt(total).to(tl.float32), mask=rows < m)


def direct(w: Tensor, b: Tensor, a: Tensor, scale: float, *, blocks: Blocks | None = None) -> Tensor:
    """Return the row norms (m,) in fp32 of w + scale b a: w (m, n) with contiguous rows, b (m, R), a (R, n).

    Two launches; temporaries: SPLITS doubles per row, and the terms of fp32 factors, O((m + n) R). A row whose squares
    leave fp32 comes out as 0 or inf.
    """
    b, a = map(by_rows, spelled(b, a))
    (m, n), rank = w.shape, b.shape[1]
    s = blocks or pick("row_norms", itemsize=w.element_size(), rank=rank)
    partial = torch.empty((s["SPLITS"], m), dtype=torch.float64, device=w.device)
    out = torch.empty(m, dtype=torch.float32, device=w.device)
    _squares[(triton.cdiv(m, s["BM"]), s["SPLITS"])](
        w, b, a, partial, m, n, rank, w.stride(0), b.stride(0), a.stride(0), float(scale),
        BM=s["BM"], BN=s["BN"], BK=s["BK"], SPLITS=s["SPLITS"], EVEN=n % s["BN"] == 0 and rank % s["BK"] == 0,
        EARLY=bool(s["EARLY"]), ONCE=rank <= s["BK"], **options(s),
    )  # fmt: skip
    _finish[(triton.cdiv(m, 256),)](partial, out, m, SPLITS=s["SPLITS"], BM=256)
    return out


def fits(w: Tensor, b: Tensor, a: Tensor) -> bool:
    """True for w (m, n) with contiguous rows, b (m, R), a (R, n)."""
    matrices = w.ndim == b.ndim == a.ndim == 2 and w.stride(1) == 1
    return matrices and (*w.shape, b.shape[1]) == (b.shape[0], a.shape[1], a.shape[0])


def in_range(norms: Sequence[Tensor]) -> list[bool]:
    """Tell for each tensor of norms whether every square stayed well inside fp32; one synchronisation for all."""
    flags = torch.stack([((x > 1e-15) & (x < 1e15)).all() for x in norms])
    return [bool(flag) for flag in flags.tolist()]
