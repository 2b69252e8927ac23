from __future__ import annotations

import pytest
import torch

from loratools.errors import NumericsError
from loratools.kernels.truncate import fused_truncate
from loratools.linalg import factored, select

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = pytest.mark.usefixtures("force")


def pair(random, m, n, rank, dtype, decay, seed=0):
    """Factors of a product with singular values near 10^(-decay j), hidden by a rotation."""
    s = 10.0 ** (-decay * torch.arange(rank, dtype=torch.float64))
    q = torch.linalg.qr(random(rank, rank, FP32, seed).double())[0]
    b = random(m, rank, FP32, seed + 1).double() @ torch.diag(s.to(q.device)) @ q
    return b.to(dtype), (q.mT @ random(rank, n, FP32, seed + 2).double()).to(dtype)


def excess(b, a, scale, made):
    """Frobenius error beyond the optimum, relative to the product."""
    d = scale * b.double() @ a.double()
    s = torch.linalg.svdvals(d)
    error = torch.linalg.matrix_norm(made.b.double() @ made.a.double() - d)
    return float((error - torch.linalg.vector_norm(s[made.rank :])) / torch.linalg.vector_norm(s))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_different_shapes_equal_the_textbook(random, dtype):
    pairs = [
        pair(random, 40, 30, 4, dtype, 0.2),
        pair(random, 17, 50, 4, dtype, 0.2, 5),
        pair(random, 3, 20, 4, dtype, 0.2),
    ]
    scales, chooses = [1.0, -2.0, 0.5], [lambda s: 2, lambda s: select.rank_for_energy(s, 0.9), lambda s: 2]
    got = factored.truncate_many(pairs, scales, chooses)
    want = [factored.truncate(b, a, c, scale=s) for (b, a), s, c in zip(pairs, scales, chooses, strict=True)]
    for (b, a), scale, made, ours in zip(pairs, scales, got, want, strict=True):
        assert (made.rank, made.b.shape, made.a.shape) == (ours.rank, ours.b.shape, ours.a.shape)
        assert made.b.dtype == made.a.dtype == FP32
        assert excess(b, a, scale, made) <= 1e-6
        size = float(ours.singular_values[0])
        assert (
            float((made.singular_values - ours.singular_values).abs().max()) <= 1e-3 * size
        )  # documented: rough below
        assert abs(made.error - ours.error) <= 1e-6
        assert abs(made.energy - ours.energy) <= 1e-6
        kept = torch.diag(made.singular_values[: made.rank])  # balanced, to the trust limit of a kept direction
        for gram in (made.b.double().mT @ made.b.double(), made.a.double() @ made.a.double().mT):
            assert float((gram - kept).abs().max()) <= 2e-3 * size


def test_steep_products_take_fp64_gram_matrices_and_hopeless_ones_qr(random):
    pairs = [pair(random, 40, 30, 4, FP32, 1.5), pair(random, 40, 30, 4, FP32, 4.0), pair(random, 40, 30, 4, FP32, 0.2)]
    made = factored.truncate_many(pairs, [1.0] * 3, [lambda s: 3, lambda s: 3, lambda s: 2])
    assert [x.route for x in made] == ["gram64", "qr", "gram32"]
    assert all(excess(b, a, 1.0, x) <= 1e-6 for (b, a), x in zip(pairs, made, strict=True))


def test_zero_products_different_ranks_and_mixed_dtypes(random):
    b, a = random(12, 3, BF16), random(3, 20, FP32)
    c, d = random(9, 2, FP16), random(2, 8, FP16)
    made = factored.truncate_many([(b * 0, a), (b, a), (c, d)], [1.0, 0.5, 1.0], [lambda s: 2] * 3)
    assert made[0].energy == 1.0
    assert bool((made[0].b == 0).all())
    assert [excess(b.float(), a, 0.5, made[1]) <= 1e-6, excess(c, d, 1.0, made[2]) <= 1e-6] == [True, True]


def test_the_same_bits_alone_and_among_others(random):
    pairs = [pair(random, 70, 40, 4, BF16, 0.2), pair(random, 33, 90, 4, BF16, 0.2, 5)]
    together = fused_truncate(pairs, [1.0, 1.0], [lambda s: 2] * 2)
    alone = fused_truncate(pairs[1:], [1.0], [lambda s: 2])[0]
    assert torch.equal(together[1].b, alone.b)
    assert torch.equal(together[1].a, alone.a)


def test_nan_is_the_textbooks_error(random):
    b, a = pair(random, 20, 20, 3, BF16, 0.2)
    b[3, 1] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        factored.truncate_many([(b, a)], [1.0], [lambda s: 2])
