from __future__ import annotations

import pytest
import torch

from loratools.kernels.gram import NOISE, grams, grams_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = {"BK": 16, "STRETCH": 48, "warps": 4, "stages": 2}
SHAPES = [(130, 7, False), (5, 100, True), (1, 1, False), (16, 16, True), (33, 12, False), (1, 50, True)]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_different_shapes_in_one_launch_equal_float64_within_the_noise(random, dtype):
    factors = [random(*shape, dtype) for *shape, _ in SHAPES]
    wide = [w for *_, w in SHAPES]
    got = grams(factors, wide=wide, blocks=SMALL)
    for made, want in zip(got, grams_reference(factors, wide=wide), strict=True):
        rank = want.shape[0]
        size = want.diagonal().sqrt()
        # BK / 16 ulps in a tile of 16-bit products, BK u of fp32 ones: 16 x 2^-24 = 9.5e-7 at most
        assert bool(((made[:rank, :rank] - want).abs() <= 2 * NOISE * size[:, None] * size).all())
        assert bool((made[rank:] == 0).all())
        assert bool((made[:, rank:] == 0).all())


def test_addresses_that_are_multiples_of_16_give_the_same_bits(random):
    framed = random(64, 16, BF16)
    assert torch.equal(grams([framed.clone()], wide=[False]), grams([framed], wide=[False]))


def test_the_order_of_the_work_changes_nothing_and_nan_stays_where_it_is(random):
    a, b = random(90, 8, BF16), random(8, 70, BF16)
    one, other = grams([a, b], wide=[False, True], blocks=SMALL), grams([b, a], wide=[True, False], blocks=SMALL)
    assert torch.equal(one[0], other[1])
    assert torch.equal(one[1], other[0])
    a[70, 3] = float("nan")
    spoilt = grams([a, b], wide=[False, True], blocks=SMALL)
    assert bool(spoilt[0, 3, :8].isnan().all())
    assert torch.equal(spoilt[1], one[1])
