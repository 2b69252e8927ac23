"""Batched SVD of small square matrices, order up to 128: one-sided Jacobi in fp64, one program a matrix.

Columns are rotated in pairs until all are orthogonal: X V = U S. A round rotates half as many disjoint pairs as there
are columns at once, a sweep is all pairs (round-robin tournament). The matrix and V stay in the caches: 2 x 32 KB for
order 64. For a positive semidefinite matrix this is its eigendecomposition, with values as accurate as they are large.

Source: Hestenes 1958; Demmel, Veselic, "Jacobi's method is more accurate than QR", SIMAX 1992. Error of the result: a
few C eps of the largest value, columns of V orthonormal to a few C eps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from loratools.kernels.blocks import Blocks, pick
from loratools.kernels.target import Tensor, power_of_two

LARGEST = 128
SWEEPS = 24
TOLERANCE = 4e-15
"""Cosine below which two columns count as orthogonal: the rounding of their inner product."""


class Triples(NamedTuple):
    """u (batch, c, c), s (batch, c) descending, v (batch, c, c): x = u diag(s) v^T; columns of u are 0 where s is 0.

    ``converged (batch,)`` is false where columns were still turning after all sweeps, or are not numbers.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    converged: Tensor


def svd_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the specification: u, s, v of x (batch, c, c) in float64 by LAPACK (signs are free)."""
    u, s, vh = torch.linalg.svd(x.double())
    return u, s, vh.mT


@triton.jit
def _turn(x: tl.tensor, p: tl.tensor, q: tl.tensor, cosine: tl.tensor, sine: tl.tensor, mask: tl.tensor) -> None:
    first, second = tl.load(x + p, mask=mask, other=0.0), tl.load(x + q, mask=mask, other=0.0)
    tl.debug_barrier()
    tl.store(x + p, cosine * first - sine * second, mask=mask)
    tl.store(x + q, sine * first + cosine * second, mask=mask)


@triton.jit
def _sweeps(
    x: tl.tensor,
    v: tl.tensor,
    left: tl.tensor,
    N: tl.constexpr,
    C: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
    SWEEPS: tl.constexpr,
    TOLERANCE: tl.constexpr,
) -> None:
    matrix = tl.program_id(0).to(tl.int64)
    x += matrix * N * C
    v += matrix * N * C
    pair = tl.arange(0, PAIRS)
    along = tl.arange(0, CHUNK)[None, :]
    mask = (pair[:, None] < N // 2) & (along >= 0)
    sweep = 0
    turned = 1
    while (turned > 0) & (sweep < SWEEPS):
        turned = 0
        for step in range(N - 1):
            # column 0 stays, the others go round; pair i is the i-th from the left with the i-th from the right
            p = tl.where(pair == 0, 0, 1 + (pair - 1 + step + N - 1) % (N - 1))[:, None] * C + along
            q = (1 + (N - 2 - pair + step) % (N - 1))[:, None] * C + along
            pp = tl.zeros((PAIRS,), tl.float64)
            qq = tl.zeros((PAIRS,), tl.float64)
            pq = tl.zeros((PAIRS,), tl.float64)
            for c in tl.static_range(0, C, CHUNK):
                first, second = tl.load(x + p + c, mask=mask, other=0.0), tl.load(x + q + c, mask=mask, other=0.0)
                pp += tl.sum(first * first, axis=1)
                qq += tl.sum(second * second, axis=1)
                pq += tl.sum(first * second, axis=1)
            turns = tl.abs(pq) > tl.sqrt(pp) * tl.sqrt(qq) * TOLERANCE  # false for NaN
            zeta = (qq - pp) / tl.where(turns, 2.0 * pq, 1.0)
            tangent = tl.where(zeta < 0, -1.0, 1.0) / (tl.abs(zeta) + tl.sqrt(1.0 + zeta * zeta))
            cosine = tl.where(turns, 1.0 / tl.sqrt(1.0 + tangent * tangent), 1.0)
            sine = tl.where(turns, cosine * tangent, 0.0)
            for c in tl.static_range(0, C, CHUNK):
                _turn(x, p + c, q + c, cosine[:, None], sine[:, None], mask)
                _turn(v, p + c, q + c, cosine[:, None], sine[:, None], mask)
            turned += tl.sum(turns.to(tl.int32), axis=0)
            tl.debug_barrier()  # the next pairs are made of columns that other threads wrote
        sweep += 1
    tl.store(left + matrix, turned)


def svd(x: Tensor, *, blocks: Blocks | None = None) -> Triples:
    """Return the singular triples of x (batch, c, c) fp64, 1 <= c <= 128. NaN passes through as NaN, not converged.

    One launch and a few small batched operations. The table names the library's routine (``jacobi`` 0) where that
    measures faster.
    """
    chosen = blocks or pick("small_svd", order=x.shape[-1])
    if not chosen["jacobi"]:
        return _by_library(x)
    batch, order, _ = x.shape
    size = torch.linalg.matrix_norm(x)[:, None, None]
    scaled = x / torch.where(size > 0, size, 1.0)
    columns = order + order % 2
    work = torch.zeros((batch, columns, power_of_two(columns)), dtype=torch.float64, device=x.device)
    work[:, :order, :order] = scaled.mT  # a column of the matrix is a row here: contiguous
    v = torch.zeros_like(work)
    v[:, :order, :order] = torch.eye(order, dtype=torch.float64, device=x.device)
    left = torch.empty(batch, dtype=torch.int32, device=x.device)
    _sweeps[(batch,)](
        work, v, left, N=columns, **tile(columns), SWEEPS=SWEEPS, TOLERANCE=TOLERANCE,
        num_warps=chosen["warps"], num_stages=1,
    )  # fmt: skip
    rows, v = work[:, :order, :order], v[:, :order, :order]
    s = torch.linalg.vector_norm(rows, dim=-1)
    s, places = torch.sort(s, dim=-1, descending=True, stable=True)
    rows, v = (t.gather(1, places[:, :, None].expand_as(t)) for t in (rows, v))
    u = rows / torch.where(s > 0, s, 1.0)[:, :, None]
    return Triples(u.mT, s * size[:, :, 0], v.mT, (left == 0) & torch.isfinite(size[:, 0, 0]))


def tile(columns: int) -> dict[str, int]:
    """Return what a program works on, for an even number of columns: padded lengths, 2048 numbers at once."""
    length, pairs = power_of_two(columns), power_of_two(columns // 2)
    return {"C": length, "PAIRS": pairs, "CHUNK": min(length, 2048 // pairs)}


def _by_library(x: Tensor) -> Triples:
    fine = torch.isfinite(x).all(dim=(-1, -2))
    u, s, vh = torch.linalg.svd(torch.where(fine[:, None, None], x, 0.0))
    nan = torch.where(fine, 0.0, torch.nan)
    return Triples(u * (s > 0)[:, None, :], s + nan[:, None], vh.mT, fine)
