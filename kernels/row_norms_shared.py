"""Row norms of W + s_k B_k A_k for many adapters k on one base W, in the factored form: W is read once for all.

norm^2 = |w|^2 + 2 s <w, b A> + s^2 |b A|^2 with <w, b A> = <w A^T, b> and |b A|^2 = b (A A^T) b^T. The kernel forms
W A^T by blocks of 16 to 128 rows of A in registers, together with |w|^2; the blocks of all adapters that share rows of
W run next to each other, so that W comes from memory once and from L2 afterwards.

Choice by arithmetic intensity: one adapter of rank R costs R flop per byte of W in bf16. Below the balance of the
machine (about 200 on an H200) the direct form waits for W, once per adapter; sharing W divides that by the number of
adapters. Beyond it the tensor cores are the floor either way, and the direct form has no cross terms.

Error of a squared norm: the three terms are right to about 5e-7 of their own sizes, so where they cancel, norm^2 <
(|w|^2 + 2 |s <w, b A>| + s^2 |b A|^2) / CANCELLED, the module is done again by the direct form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from loratools.kernels.blocks import Blocks, options, pick
from loratools.kernels.row_norms import direct
from loratools.kernels.spelled import terms
from loratools.kernels.target import Tensor, by_rows, common, power_of_two
from loratools.kernels.tiles import mma, plus

CANCELLED = 4.0
"""Sum of the terms' sizes over their sum, beyond which a module is redone: keeps the error below 2e-6."""


def shared_reference(w: Tensor, bs: Sequence[Tensor], as_: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the specification of the launch in float64: |w_i|^2 (m,) and <w_i, (b_k a_k)_i> (adapters, m)."""
    wide = w.double()
    return (wide**2).sum(1), torch.stack(
        [(wide * (b.double() @ a.double())).sum(1) for b, a in zip(bs, as_, strict=True)]
    )


@triton.jit
def _terms(
    w: tl.tensor,
    b: tl.tensor,
    a: tl.tensor,
    cross: tl.tensor,
    size: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    w_row: tl.tensor,
    b_row: tl.tensor,
    DOT: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    block = tl.program_id(0)  # the fastest index: neighbours share the rows of W
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    r = block * BR + tl.arange(0, BR)
    is_row = rows[:, None] < m
    place = rows[:, None].to(tl.int64)
    u = tl.zeros((BM, BR), tl.float32)
    squares = tl.zeros((BM,), tl.float64)
    for start in range(0, n, BK):
        k = start + tl.arange(0, BK)
        is_k = k[None, :] < n
        base = tl.load(w + place * w_row + k[None, :], mask=is_row & is_k, other=0.0)
        wide = tl.load(a + r[:, None].to(tl.int64) * n + k[None, :], mask=is_k, other=0.0)
        u = plus(u, mma(base.to(DOT), tl.trans(wide.to(DOT))))
        full = base.to(tl.float32)
        squares += tl.sum(full * full, axis=1).to(tl.float64)
    tall = tl.load(b + place * b_row + r[None, :], mask=is_row, other=0.0).to(tl.float32)
    tl.store(cross + block.to(tl.int64) * m + rows, tl.sum(tall * u, axis=1), mask=rows < m)
    tl.store(size + rows, squares, mask=(rows < m) & (block == 0))


def shared_terms(
    w: Tensor, bs: Sequence[Tensor], as_: Sequence[Tensor], *, blocks: Blocks | None = None
) -> tuple[Tensor, Tensor]:
    """Return |w_i|^2 (m,) and the inner products <w_i, (b_k a_k)_i> (adapters, m), both fp64: one launch.

    Temporaries: the stacked factors, their ranks rounded up to a block; never a matrix of W's size. fp32 and fp16
    rows of A on a bf16 W are stacked as bf16 terms, so that W stays on tensor cores as it is stored.
    """
    if w.dtype == torch.bfloat16:
        cut = [terms(a)[::-1] for a in as_]
        bs, as_ = [torch.cat([b] * len(c), 1) for b, c in zip(bs, cut, strict=True)], [torch.cat(c) for c in cut]
    (m, n), ranks = w.shape, [b.shape[1] for b in bs]
    s = blocks or pick("row_norms_shared", itemsize=w.dtype.itemsize, rank=max(ranks))
    width = min(power_of_two(max(ranks)), s["BR"])
    dot = common(w, *as_)
    counts = [triton.cdiv(rank, width) for rank in ranks]
    total = sum(counts) * width
    tall = torch.zeros((m, total), dtype=common(*bs), device=w.device)
    wide = torch.zeros((total, n), dtype=dot, device=w.device)
    at = 0
    for b, a, rank, count in zip(bs, as_, ranks, counts, strict=True):
        tall[:, at : at + rank], wide[at : at + rank] = b, a
        at += count * width
    cross = torch.empty((sum(counts), m), dtype=torch.float32, device=w.device)
    size = torch.empty(m, dtype=torch.float64, device=w.device)
    dots = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    _terms[(sum(counts), triton.cdiv(m, s["BM"]))](
        w, tall, wide, cross, size, m, n, w.stride(0), tall.stride(0),
        DOT=dots[dot], BM=s["BM"], BR=width, BK=s["BK"], **options(s),
    )  # fmt: skip
    return size, torch.stack([part.double().sum(0) for part in cross.split(counts)])


def shared(
    w: Tensor, bs: Sequence[Tensor], as_: Sequence[Tensor], scales: Sequence[float], *, blocks: Blocks | None = None
) -> list[Tensor]:
    """Return the row norms (m,) in fp32 of w + scale_k b_k a_k for every k; W is read once."""
    size, cross = shared_terms(w, bs, as_, blocks=blocks)
    squares, cancelled = [], []
    for b, a, s, inner in zip(bs, as_, scales, cross, strict=True):
        tall, gram = b.double(), a.double() @ a.double().mT
        product = s * s * ((tall @ gram) * tall).sum(1)
        square = size + 2 * s * inner + product
        squares.append(square)
        cancelled.append((size + 2 * abs(s) * inner.abs() + product > CANCELLED * square).any())
    redone = torch.stack(cancelled).tolist()
    return [
        direct(w, by_rows(b), by_rows(a), s) if again else square.sqrt().float()
        for b, a, s, square, again in zip(bs, as_, scales, squares, redone, strict=True)
    ]
