"""The test matrix of signs, made where it is used: Philox-4x32-10, the same bits as :mod:`loratools.linalg.seeds`.

Entry (row, column) is bit 31 of the first word of the block with counter (column, row, 0, 0). It depends on nothing
else, so neither tiles nor devices change it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loratools.kernels.target import Tensor
from loratools.linalg import seeds

ROUNDS = tl.constexpr(10)
M0, M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
W0, W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


def signs_reference(key: seeds.Key, rows: int, cols: int) -> Tensor:
    """Return the specification: the CPU's own entries, +1 and -1, in float64."""
    return torch.from_numpy(seeds.signs(key, rows, cols)).double()


@triton.jit
def words(row: tl.tensor, column: tl.tensor, k0: tl.tensor, k1: tl.tensor) -> tl.tensor:
    """Return the uint32 words of entries (row, column): uint32 tensors that broadcast together."""
    x0 = column + tl.zeros_like(row)
    x1 = row + tl.zeros_like(column)
    x2 = tl.zeros_like(x0)
    x3 = tl.zeros_like(x0)
    for _ in tl.static_range(ROUNDS):
        high0, high1 = tl.umulhi(x0, tl.full(x0.shape, M0, tl.uint32)), tl.umulhi(x2, tl.full(x0.shape, M1, tl.uint32))
        low0, low1 = x0 * tl.full(x0.shape, M0, tl.uint32), x2 * tl.full(x0.shape, M1, tl.uint32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0 += tl.full((), W0, tl.uint32)
        k1 += tl.full((), W1, tl.uint32)
    return x0


@triton.jit
def signs_tile(rows: tl.tensor, cols: tl.tensor, key: tl.tensor) -> tl.tensor:
    """Return the signs of rows (p,) and columns (q,) in bf16, (p, q); ``key`` holds two words, k0 in the low half."""
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word = words(rows[:, None].to(tl.uint32), cols[None, :].to(tl.uint32), k0, k1)
    return (1.0 - 2.0 * (word >> 31).to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _signs(keys: tl.tensor, out: tl.tensor, n: tl.tensor, width: tl.tensor, BN: tl.constexpr, BL: tl.constexpr) -> None:
    batch = tl.program_id(1)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.arange(0, BL)
    tile = signs_tile(rows, cols, tl.load(keys + batch))
    inside = (rows[:, None] < n) & (cols[None, :] < width)
    at = batch.to(tl.int64) * n * width + rows[:, None].to(tl.int64) * width + cols[None, :]
    tl.store(out + at, tile, mask=inside)


def packed(keys: list[seeds.Key], device: torch.device) -> Tensor:
    """Return keys as int64, the first word in the low half."""
    whole = [k0 | k1 << 32 for k0, k1 in keys]
    return torch.tensor([k - (1 << 64) if k >> 63 else k for k in whole], dtype=torch.int64, device=device)


def signs(keys: list[seeds.Key], n: int, width: int, device: torch.device) -> Tensor:
    """Return the test matrices of the keys, (keys, n, width) of +1 and -1 in bf16."""
    out = torch.empty((len(keys), n, width), dtype=torch.bfloat16, device=device)
    _signs[(triton.cdiv(n, 64), len(keys))](
        packed(keys, device), out, n, width, BN=64, BL=triton.next_power_of_2(max(width, 16))
    )
    return out
