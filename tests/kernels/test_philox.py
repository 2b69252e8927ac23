from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from loratools.kernels.philox import signs, signs_reference, words
from loratools.linalg import seeds

KEYS = [(0, 0), (2**32 - 1, 2**32 - 1), seeds.key_of(7, "model.layers.0.self_attn.q_proj.weight")]


@triton.jit
def _words(out: tl.tensor, k0: tl.constexpr, k1: tl.constexpr):
    row, column = tl.arange(0, 16)[:, None].to(tl.uint32), tl.arange(0, 8)[None, :].to(tl.uint32)
    word = words(row, column, tl.full((), k0, tl.uint32), tl.full((), k1, tl.uint32))
    tl.store(out + tl.arange(0, 16)[:, None] * 8 + tl.arange(0, 8)[None, :], word.to(tl.int64))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (70, 26), (130, 17), (64, 40)])
def test_entries_equal_the_cpus_bit_for_bit(random, rows, width):
    got = signs(KEYS, rows, width, random(1, 1).device)
    assert got.dtype == torch.bfloat16
    for made, key in zip(got, KEYS, strict=True):
        assert torch.equal(made.double().cpu(), signs_reference(key, rows, width))


def test_words_themselves_equal_the_cpus(random):
    out = torch.zeros((16, 8), dtype=torch.int64, device=random(1, 1).device)
    _words[(1,)](out, *KEYS[2])
    assert out.tolist() == seeds.words(KEYS[2], 16, 8).tolist()
