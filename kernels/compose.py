"""What a DoRA adds to its base, (g - 1) W + g s B A, with B A in registers: one read of W, one write.

The stable form: near g = 1 the two terms are small on their own, where g (W + s B A) - W would lose their digits to W.
g - 1 is formed in fp32, whatever the dtype of W. Error against float64 of the stored values, with u = 2^-24: 3u of
each term's size, and for B A (R / 8) u |b_i| |A_j| from truncating tensor cores (R / 7 for fp32 factors, see
row_norms).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from loratools.dispatch import fuses
from loratools.kernels.blocks import Blocks, options, pick
from loratools.kernels.row_norms import fits
from loratools.kernels.spelled import spelled
from loratools.kernels.target import Tensor, by_rows, usable
from loratools.kernels.tiles import mma_onto
from loratools.linalg import row_norms


def compose_reference(w: Tensor, b: Tensor, a: Tensor, gain: Tensor, scale: float) -> Tensor:
    """Return the specification in float64: w (m, n), b (m, R), a (R, n), gain (m,) -> (g - 1) w + g scale b a."""
    g = gain.double()[:, None]
    return (g - 1.0) * w.double() + g * (scale * (b.double() @ a.double()))


@triton.jit
def _compose(
    w: tl.tensor,
    b: tl.tensor,
    a: tl.tensor,
    gain: tl.tensor,
    out: tl.tensor,
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
    EVEN: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    is_col = cols[None, :] < n
    held = tl.minimum(rows, m - 1)  # beyond the last row: read it again, store nothing
    place = held[:, None].to(tl.int64)
    k = tl.arange(0, BK)
    talls = b + place * b_row + k[None, :]
    wides = a + k[:, None].to(tl.int64) * a_row + cols[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    base = tl.load(w + place * w_row + cols[None, :], mask=is_col, other=0.0)  # its latency passes during the product
    for start in range(0, rank, BK):
        if EVEN:
            tall, wide = tl.load(talls + start), tl.load(wides + start * tl.cast(a_row, tl.int64))
        else:
            tall = tl.load(talls + start, mask=k[None, :] < rank - start, other=0.0)
            wide = tl.load(
                wides + start * tl.cast(a_row, tl.int64), mask=(k[:, None] < rank - start) & is_col, other=0.0
            )
        acc = mma_onto(tall, wide, acc)
    g = tl.load(gain + held)[:, None]
    change = (g - 1.0) * base.to(tl.float32) + g * (scale * acc)
    tl.store(out + place * n + cols[None, :], change, mask=(rows[:, None] < m) & is_col)


def composed(w: Tensor, b: Tensor, a: Tensor, gain: Tensor, scale: float, *, blocks: Blocks | None = None) -> Tensor:
    """Return (g - 1) w + g scale b a (m, n) in fp32: w (m, n) with contiguous rows, b (m, R), a (R, n), gain (m,)."""
    b, a = map(by_rows, spelled(b, a))
    (m, n), rank = w.shape, b.shape[1]
    s = blocks or pick("compose", itemsize=w.element_size())
    out = torch.empty((m, n), dtype=torch.float32, device=w.device)
    _compose[(triton.cdiv(m, s["BM"]), triton.cdiv(n, s["BN"]))](
        w, b, a, gain.float().contiguous(), out, m, n, rank, w.stride(0), b.stride(0), a.stride(0), float(scale),
        BM=s["BM"], BN=s["BN"], BK=s["BK"], EVEN=n % s["BN"] == 0 and rank % s["BK"] == 0, **options(s),
    )  # fmt: skip
    return out


def accepts(w: Any, b: Any, a: Any, gain: Any, *, scale: float = 1.0) -> bool:
    """True for matrices of fp32, bf16 or fp16 on one GPU, the rows of w contiguous, the rank at least 1."""
    return usable(w, b, a, gain) and fits(w, b, a) and gain.shape == w.shape[:1]


@fuses(row_norms.compose, when=accepts)
def fused_compose(w: Tensor, b: Tensor, a: Tensor, gain: Tensor, *, scale: float = 1.0) -> Tensor:
    """Return :func:`composed`."""
    return composed(w, b, a, gain, scale)
