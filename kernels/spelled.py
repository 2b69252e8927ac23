"""Products of factors of any dtype as products of 16-bit ones: fp32 factors are cut into bf16 terms beforehand.

b = b1 + b2 + b3 and a = a1 + a2 + a3 exactly (three bf16 terms hold the 24 bits of fp32, two the 11 of fp16), so b a is
the sum of the b_i a_j: one product [b3 b2 b1 b2 b1 b1] [a1; a2; a3; a1; a2; a1] of six times the rank.
Terms with i + j > 4 are left out: they are below 2^-25 of |b| |a|. The small ones come first, so that the chain of sums
is hardly longer than one rank where its sums are large: R / 16 + (5 R / 16) 2^-8 truncations of 2u, below (R / 7) u.
"""

from __future__ import annotations

import torch

from loratools.kernels.target import Tensor

TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""bf16 terms that hold every number of a dtype."""


def spelled(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return b (m, R), a (R, n) in one 16-bit dtype: themselves, or (m, t R), (t R, n), t <= 6, of the same product.

    O((m + n) R) time and memory.
    """
    if b.dtype == a.dtype != torch.float32:
        return b, a
    bs, as_ = terms(b), terms(a)
    most = max(len(bs), len(as_)) - 1
    pairs = sorted(((i, j) for i in range(len(bs)) for j in range(len(as_)) if i + j <= most), key=sum, reverse=True)
    return torch.cat([bs[i] for i, _ in pairs], 1), torch.cat([as_[j] for _, j in pairs], 0)


def terms(x: Tensor) -> list[Tensor]:
    """Return bf16 tensors, the largest first, whose sum is x exactly (but for what underflows)."""
    found, rest = [x.bfloat16()], x
    for _ in range(TERMS[x.dtype] - 1):
        rest = rest.float() - found[-1].float()
        found.append(rest.bfloat16())
    return found
