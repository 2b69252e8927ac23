from __future__ import annotations

import pytest
import torch

from loratools.kernels.thin import thin, thin_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = {"BM": 16, "STRETCH": 48, "warps": 4, "stages": 2}
SHAPES = [(130, 7, False, 3), (7, 100, True, 7), (1, 7, False, 1), (7, 16, True, 2)]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_different_shapes_in_one_launch_equal_float64_within_the_bound(random, dtype):
    factors = [random(m, n, dtype) for m, n, _, _ in SHAPES]
    wide, ranks = [s[2] for s in SHAPES], [s[3] for s in SHAPES]
    cores = torch.stack([random(7, 7, FP32, seed).contiguous() for seed in range(len(SHAPES))])
    got = thin(factors, cores, ranks, wide=wide, blocks=SMALL)
    used = [core[:, :k] for core, k in zip(cores, ranks, strict=True)]
    sizes = thin_reference([x.abs() for x in factors], [c.abs() for c in used], wide=wide)
    for made, want, size in zip(got, thin_reference(factors, used, wide=wide), sizes, strict=True):
        assert made.shape == want.shape
        assert bool(((made - want).abs() <= (7 / 16 + 6) * 2.0**-23 * size).all())


def test_determinism_and_nan(random):
    x, core = random(40, 5, BF16), random(5, 3, FP32)[None].contiguous()
    first = thin([x], core, [3], wide=[False], blocks=SMALL)[0]
    assert torch.equal(first, thin([x], core, [3], wide=[False], blocks=SMALL)[0])
    x[7, 2] = float("nan")
    assert thin([x], core, [3], wide=[False], blocks=SMALL)[0].isnan().nonzero()[:, 0].tolist() == [7, 7, 7]
