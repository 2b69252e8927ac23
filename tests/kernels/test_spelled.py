from __future__ import annotations

import pytest
import torch

from loratools.kernels.spelled import spelled, terms

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(("dtype", "count"), [(BF16, 1), (FP16, 2), (FP32, 3)])
def test_terms_hold_every_bit_the_largest_first(random, dtype, count):
    x = random(20, 30, dtype)
    found = terms(x)
    assert len(found) == count
    assert all(t.dtype == BF16 for t in found)
    assert torch.equal(sum(t.double() for t in found), x.double())
    sizes = [float(t.abs().max()) for t in found]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("left", "right", "count"), [(BF16, FP32, 3), (FP16, FP32, 5), (FP32, FP32, 6), (FP32, FP16, 5), (BF16, FP16, 2)]
)
def test_the_product_stays_what_it_is(random, left, right, count):
    b, a = random(9, 5, left), random(5, 12, right, 1)
    tall, wide = spelled(b, a)
    assert tall.dtype == wide.dtype == BF16
    assert tall.shape[1] == wide.shape[0] == 5 * count
    size = b.double().abs() @ a.double().abs()
    assert bool(((tall.double() @ wide.double() - b.double() @ a.double()).abs() <= 2.0**-25 * size).all())


def test_16_bit_factors_stay_and_nan_stays_nan(random):
    b, a = random(4, 3, FP16), random(3, 5, FP16)
    assert all(x is y for x, y in zip(spelled(b, a), (b, a), strict=True))
    wide = random(3, 5, FP32, 1)
    wide[1, 2] = float("nan")
    tall, cut = spelled(random(4, 3, FP32), wide)
    assert (tall.float() @ cut.float()).isnan().any(0).nonzero().tolist() == [[2]]
