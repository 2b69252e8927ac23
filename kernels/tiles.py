"""What Triton bodies share: products of tiles, exact splitting into bf16, sums that round to nearest.

Products of 16-bit numbers are exact in fp32. Tensor cores add them up with truncation (Fasi, Higham, Mikaitis,
Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021): one instruction of 16 products errs by up to one
ulp, always towards zero, so that long chains drift. Kernels therefore begin a fresh product for every tile and add it
by :func:`plus` or in fp64. TF32 is never used: fp32 operands go through ordinary fp32 arithmetic ("ieee").
"""

from __future__ import annotations

import triton
import triton.language as tl

from loratools.kernels.target import INTERPRETED

EMULATED = tl.constexpr(INTERPRETED)  # the interpreter keeps bf16 as bits, so products there widen first: exact too


@triton.jit
def mma(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """Return x (p, q) @ y (q, s) in fp32."""
    if EMULATED:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def mma_onto(x: tl.tensor, y: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Return total + x @ y, added up inside the tensor core."""
    if EMULATED:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def plus(total: tl.tensor, part: tl.tensor) -> tl.tensor:
    """Return total + part, rounded to nearest: written as a product so that no pass folds it into the tensor core."""
    return tl.fma(part, 1.0, total)


@triton.jit
def narrow(x: tl.tensor) -> tl.tensor:
    """Return fp32 ``x`` rounded to bf16."""
    return x.to(tl.bfloat16)


@triton.jit
def split_product(
    d: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor, D_TERMS: tl.constexpr, X_TERMS: tl.constexpr
) -> tl.tensor:
    """Return d @ x for x = x1 + x2 + x3 in bf16 and d, cut into D_TERMS bf16 terms.

    Three terms hold all 24 bits of fp32, two the 11 of fp16, one those of bf16. Of the products of terms i and j those
    with i + j <= max(D_TERMS, X_TERMS) + 1 are formed, the small ones first; what is left out is below 2^-24 of
    |d| |x| for three terms, 2^-16 for two.
    """
    if D_TERMS > 1:
        d = d.to(tl.float32)
    d1 = narrow(d)
    MOST: tl.constexpr = max(D_TERMS, X_TERMS)
    part = tl.zeros((d.shape[0], x1.shape[1]), tl.float32)
    if D_TERMS >= 2:
        rest = d - d1.to(tl.float32)
        d2 = narrow(rest)
        if D_TERMS >= 3:
            d3 = narrow(rest - d2.to(tl.float32))
            part = mma_onto(d3, x1, part)
        if X_TERMS >= 2 and MOST >= 3:
            part = mma_onto(d2, x2, part)
        part = mma_onto(d2, x1, part)
    if X_TERMS >= 3:
        part = mma_onto(d1, x3, part)
    if X_TERMS >= 2:
        part = mma_onto(d1, x2, part)
    return mma_onto(d1, x1, part)
