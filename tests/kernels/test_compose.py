from __future__ import annotations

import pytest
import torch

from loratools.kernels.compose import compose_reference, composed
from loratools.linalg.row_norms import compose

SMALL = {"BM": 16, "BN": 32, "BK": 16, "warps": 4, "stages": 2}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
UNIT = 2.0**-24


def bound(w, b, a, gain, scale):
    """What loratools.kernels.compose derives, entry by entry."""
    g = gain.double()[:, None]
    product = b.double().abs() @ a.double().abs()
    spelled = b.dtype != a.dtype or b.dtype == FP32
    each = max(b.shape[1] / (7 if spelled else 8), 12 if spelled else 2)
    return 3 * UNIT * (g - 1).abs() * w.double().abs() + (each + 3) * UNIT * (g * scale).abs() * product


@pytest.mark.parametrize(
    ("m", "n", "rank", "dtype", "factors"),
    [(1, 1, 1, BF16, BF16), (17, 33, 5, FP16, FP16), (20, 70, 17, BF16, FP32), (16, 64, 16, FP32, FP32)],
)
@pytest.mark.parametrize("spread", [1e-4, 0.5])
def test_equals_float64_within_the_bound_also_near_gain_1(random, m, n, rank, dtype, factors, spread):
    w, b, a = random(m, n, dtype), random(m, rank, factors, 1), random(rank, n, factors, 2)
    gain = 1 + spread * random(m, 1, FP32, 3)[:, 0]
    got = composed(w, b, a, gain, -0.5, blocks=SMALL)
    assert got.dtype == FP32
    assert bool(((got - compose_reference(w, b, a, gain, -0.5)).abs() <= bound(w, b, a, gain, -0.5)).all())


@pytest.mark.usefixtures("force")
def test_dispatch_determinism_and_nan(random):
    w, b, a, gain = random(20, 40, BF16), random(20, 3, BF16, 1), random(3, 40, BF16, 2), random(20, 1, FP32, 3)[:, 0]
    first = compose(w, b, a, gain, scale=2.0)
    assert torch.equal(first, compose(w, b, a, gain, scale=2.0))
    assert torch.allclose(first.double(), compose_reference(w, b, a, gain, 2.0), rtol=1e-5, atol=1e-5)
    w[4, 7] = float("nan")
    assert compose(w, b, a, gain).isnan().nonzero().tolist() == [[4, 7]]
