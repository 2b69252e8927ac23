from __future__ import annotations

import pytest
import torch

from loratools.dispatch import table
from loratools.errors import KernelError
from loratools.kernels.row_norms import direct, direct_reference, in_range
from loratools.kernels.row_norms_shared import shared, shared_reference, shared_terms
from loratools.linalg.row_norms import row_norms_many

SMALL = {"BM": 16, "BN": 32, "BK": 16, "SPLITS": 3, "EARLY": 1, "warps": 4, "stages": 2}
WIDE = {"BM": 16, "BR": 16, "BK": 32, "warps": 4, "stages": 2}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
UNIT = 2.0**-24
GRID = [
    # m, n, R, W, factors
    (1, 1, 1, BF16, BF16),
    (5, 33, 1, FP32, FP32),
    (17, 70, 3, BF16, FP32),
    (33, 96, 16, FP16, FP16),
    (16, 129, 40, BF16, BF16),
    (30, 47, 65, FP16, BF16),
]


def bound(w, b, a, scale, columns=128):
    """What loratools.kernels.row_norms derives, per row."""
    norm = direct_reference(w, b, a, scale).sqrt()
    spread = torch.linalg.vector_norm(b.double().abs() @ a.double().abs(), dim=1)
    spelled = b.dtype != a.dtype or b.dtype == FP32
    each = max(b.shape[1] / (7 if spelled else 8), 12 if spelled else 2)  # a last tile of 16 is begun for every term
    return (4 + torch.log2(torch.tensor(columns)) / 2) * UNIT * norm + (each + 1) * UNIT * abs(scale) * spread


@pytest.mark.parametrize(("m", "n", "rank", "dtype", "factors"), GRID)
@pytest.mark.parametrize(("scale", "early"), [(0.5, 1), (-2.0, 0)])
def test_direct_equals_float64_within_the_bound(random, m, n, rank, dtype, factors, scale, early):
    w, b, a = random(m, n, dtype), random(m, rank, factors, 1, 0.2), random(rank, n, factors, 2, 0.2)
    got = direct(w, b, a, scale, blocks={**SMALL, "EARLY": early})
    want = direct_reference(w, b, a, scale).sqrt()
    assert got.dtype == FP32
    assert bool(((got.double() - want).abs() <= bound(w, b, a, scale, SMALL["BN"])).all())
    assert bool(((got.double() - want).abs() <= 2e-6 * want).all())


def test_blocks_of_the_table_and_large_ranks(random):
    w, b, a = random(130, 140, BF16), random(130, 384, BF16, 1, 0.05), random(384, 140, BF16, 2)
    want = direct_reference(w, b, a, 0.5).sqrt()
    assert float(((direct(w, b, a, 0.5).double() - want) / want).abs().max()) < 2e-6
    b, a = random(130, 512, BF16, 1, 0.05), random(512, 140, BF16, 2)
    want = direct_reference(w, b, a, 0.5).sqrt()
    assert bool(((direct(w, b, a, 0.5).double() - want).abs() <= bound(w, b, a, 0.5)).all())


def test_one_rank_zero_scale_and_rows_that_vanish(random):
    w, b, a = random(6, 40, FP32), random(6, 1, FP32, 1), random(1, 40, FP32, 2)
    w[2] = -0.5 * b[2, 0] * a[0]  # W + s B A = 0 there, exactly in fp32
    got = direct(w, b, a, 0.5, blocks=SMALL)
    assert float(got[2]) <= 2 * UNIT * float(torch.linalg.vector_norm(w[2]))
    assert torch.allclose(direct(w, b, a, 0.0, blocks=SMALL), torch.linalg.vector_norm(w, dim=1), rtol=1e-6)


def test_nan_passes_through_as_nan_and_touches_only_its_row(random):
    w, b, a = random(20, 50, BF16), random(20, 4, BF16, 1), random(4, 50, BF16, 2)
    w[3, 49] = float("nan")
    got, clean = direct(w, b, a, 1.0, blocks=SMALL), direct(random(20, 50, BF16), b, a, 1.0, blocks=SMALL)
    assert got.isnan().nonzero().tolist() == [[3]]
    assert torch.equal(got[4:], clean[4:])
    assert row_norms_many([w], [b], [a], [1.0])[0].isnan().nonzero().tolist() == [[3]]


def test_the_same_bits_every_time_and_whatever_the_number_of_splits_within_fp64(random):
    w, b, a = random(40, 150, BF16), random(40, 7, BF16, 1), random(7, 150, BF16, 2)
    first = direct(w, b, a, 0.5, blocks=SMALL)
    assert torch.equal(first, direct(w, b, a, 0.5, blocks=SMALL))
    assert torch.allclose(first, direct(w, b, a, 0.5, blocks={**SMALL, "SPLITS": 1}), rtol=2e-7)
    assert torch.equal(first, direct(w, b, a, 0.5, blocks={**SMALL, "EARLY": 0}))


def test_fp32_factors_at_large_ranks_are_as_good_as_16_bit_ones(random):
    w, b, a = random(40, 70, BF16), random(40, 384, FP32, 1, 0.05), random(384, 70, FP32, 2)
    want = direct_reference(w, b, a, 0.5).sqrt()
    assert bool(((direct(w, b, a, 0.5).double() - want).abs() <= bound(w, b, a, 0.5, 256)).all())
    assert float(((direct(w, b, a, 0.5).double() - want) / want).abs().max()) < 2e-6


@pytest.mark.parametrize(("dtype", "factors"), [(BF16, BF16), (BF16, FP32), (FP16, FP32), (FP32, FP32)])
def test_shared_form_reads_one_base_for_all(random, dtype, factors):
    w, ranks = random(19, 70, dtype), (1, 5, 17)
    bs = [random(19, r, factors, r, 0.2) for r in ranks]
    as_ = [random(r, 70, factors, r, 0.2) for r in ranks]
    size, cross = shared_terms(w, bs, as_, blocks=WIDE)
    true_size, true_cross = shared_reference(w, bs, as_)
    # 32 columns of W at a time: at most 32 u in a tile, three tiles added to nearest, then up to 32 products
    pairs = zip(bs, as_, strict=True)
    spread = torch.stack([(w.double().abs() * (b.double().abs() @ a.double().abs())).sum(1) for b, a in pairs])
    assert bool(((cross - true_cross).abs() <= 40 * UNIT * spread).all())
    assert bool(((size - true_size).abs() <= 8 * UNIT * true_size).all())
    scales = [0.5, -1.0, 2.0]
    for got, b, a, s in zip(shared(w, bs, as_, scales, blocks=WIDE), bs, as_, scales, strict=True):
        want = direct_reference(w, b, a, s).sqrt()
        assert bool(((got.double() - want).abs() <= 2e-6 * want).all())


def test_shared_form_goes_direct_where_its_terms_cancel(random):
    w, b, a = random(6, 40, FP32), random(6, 1, FP32, 1), random(1, 40, FP32, 2)
    w[2] = -0.999 * b[2, 0] * a[0]
    got = shared(w, [b, b], [a, a], [1.0, 0.1], blocks=WIDE)
    for norms, s in zip(got, (1.0, 0.1), strict=True):
        want = direct_reference(w, b, a, s).sqrt()
        # of the row that cancels only the rounding of the product, relative to its size, is promised
        assert bool(((norms.double() - want).abs() <= 2e-6 * want + 2 * UNIT * torch.linalg.vector_norm(w[2])).all())


@pytest.mark.usefixtures("force")
def test_dispatch_serves_shapes_dtypes_and_shared_bases_in_order(random):
    w, other = random(21, 40, BF16), random(9, 33, FP32)
    ws = [w, other, w]
    bs = [random(21, 3, BF16, 1), random(9, 4, FP32, 1), random(21, 2, BF16, 5)]
    as_ = [random(3, 40, BF16, 2), random(4, 33, FP32, 2), random(2, 40, BF16, 6)]
    scales = [0.5, -1.0, 2.0]
    got = row_norms_many(ws, bs, as_, scales)
    for norms, *args, s in zip(got, ws, bs, as_, scales, strict=True):
        assert torch.allclose(norms.double(), direct_reference(*args, s).sqrt(), rtol=2e-6)


@pytest.mark.usefixtures("force")
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_squares_beyond_fp32_are_taken_in_fp64(random, size):
    w = torch.full_like(random(3, 5), size)
    zero = torch.zeros_like(w[:, :1]), torch.zeros_like(w[:1])
    assert in_range([direct(w, *zero, 1.0, blocks=SMALL)]) == [False]
    assert torch.allclose(row_norms_many([w], [zero[0]], [zero[1]], [1.0])[0], 5**0.5 * w[:, 0])


@pytest.mark.usefixtures("force")
def test_what_no_kernel_takes_is_refused_under_force(random):
    w, b, a = random(6, 8), random(6, 2, FP32, 1), random(2, 8, FP32, 2)
    for args in ((w.double(), b, a), (w, b.numpy() if not w.is_cuda else b.double(), a), (w.mT, b, a)):
        with pytest.raises(KernelError, match="no kernel accepts"):
            row_norms_many([args[0]], [args[1]], [args[2]], [1.0])


def test_registered_where_dispatch_finds_it():
    assert "loratools.kernels.row_norms_many.fused_row_norms" in table()["loratools.linalg.row_norms.row_norms_many"]
