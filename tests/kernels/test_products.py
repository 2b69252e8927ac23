from __future__ import annotations

import pytest
import torch

from loratools.kernels.products import Matrices, sketch_reference, terms, times_reference
from loratools.linalg import seeds

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = {"BM": 16, "BK": 16, "SPLITS": 2, "warps": 4, "stages": 2, "fused": 1}
KEYS = [seeds.key_of(0, "x"), seeds.key_of(1, "y")]
FULL, HALF = 2.0**-20, 2.0**-13  # of |d_i| |x_j|: see loratools.kernels.products; HALF: 16 bits of the block


def matrices(random, m, n, dtype, minus):
    ds = [random(m, n, dtype, seed) for seed in (1, 2)]
    return ds, [random(m, n, dtype, seed) for seed in (3, 4)] if minus else None


def close(got, want, d, x, tolerance):
    size = torch.linalg.vector_norm(d.double(), dim=1)[:, None] * torch.linalg.vector_norm(x.double(), dim=0)
    return bool(((got.double() - want).abs() <= tolerance * size).all())


@pytest.mark.parametrize("minus", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_products_equal_float64_of_the_stored_values(random, dtype, minus):
    m, n, width = 17, 40, 5
    ds, bases = matrices(random, m, n, dtype, minus)
    batch = Matrices(ds, bases)
    x, y = (torch.stack([random(rows, width, FP32, s).contiguous() for s in (5, 6)]) for rows in (n, m))
    full, short = batch.times(x, blocks=SMALL), batch.times(x, count=2, blocks=SMALL)
    turned, sketch = batch.turned_times(y, blocks=SMALL), batch.sketch(KEYS, width, blocks=SMALL)
    for i in range(2):
        d, base = ds[i], None if bases is None else bases[i]
        dense = d.double() - (0 if base is None else base.double())
        assert close(full[i], times_reference(d, base, x[i]), dense, x[i], FULL)
        assert close(short[i], times_reference(d, base, x[i]), dense, x[i], HALF)
        back = times_reference(d.mT, None if base is None else base.mT, y[i])
        assert close(turned[i], back, dense.mT, y[i], FULL)
        signs = torch.ones(n, width, dtype=torch.float64, device=d.device)
        assert close(
            sketch[i],
            sketch_reference(d, base, KEYS[i], width),
            dense,
            signs,
            FULL if dtype != FP32 and not minus else HALF,
        )


def test_a_stored_test_matrix_gives_the_same_bits_as_one_made_in_the_tile(random):
    batch = Matrices(*matrices(random, 20, 40, BF16, False))
    assert torch.equal(batch.sketch(KEYS, 5, blocks=SMALL), batch.sketch(KEYS, 5, blocks={**SMALL, "fused": 0}))


def test_results_do_not_depend_on_tiles_or_the_batch_beyond_rounding(random):
    ds, _ = matrices(random, 20, 33, BF16, False)
    whole = Matrices(ds).sketch(KEYS, 5, blocks=SMALL)
    assert torch.equal(whole, Matrices(ds).sketch(KEYS, 5, blocks=SMALL))
    assert torch.equal(whole[1], Matrices(ds[1:]).sketch(KEYS[1:], 5, blocks=SMALL)[0])
    other = Matrices(ds).sketch(KEYS, 5, blocks={**SMALL, "BM": 32, "SPLITS": 1})
    assert torch.allclose(whole, other, rtol=1e-5, atol=1e-5)


def test_three_terms_hold_all_of_fp32_and_nan_passes_through(random):
    x = random(20, 5, FP32)[None].contiguous()
    assert torch.equal(terms(x, 3).double().sum(1)[..., :5], x.double())
    ds, _ = matrices(random, 20, 33, BF16, False)
    ds[0][4, 30] = float("nan")
    got = Matrices(ds).sketch(KEYS, 5, blocks=SMALL)
    assert got.isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[0, 4]]
