from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.linalg import gram
from loratools.linalg.namespace import dtype_name, to_numpy

SIZES = st.sampled_from([1, 2, 5, 2047, 2048, 2049, 4100])


@settings(max_examples=20, deadline=None)
@given(SIZES, st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_cross_is_the_inner_product_of_columns(array, n, r, s, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, r)).astype(np.float32), rng.standard_normal((n, s)).astype(np.float32)
    got = gram.cross(array(x), array(y))
    size = np.linalg.norm(x, axis=0)[:, None] * np.linalg.norm(y, axis=0)
    assert dtype_name(got) == "float64"
    # fp32 sums of at most 2048 terms in blocks and lanes: a few eps of the sizes
    assert (np.abs(to_numpy(got) - x.astype(float).T @ y) <= 8 * 6e-8 * size).all()
    wide = to_numpy(gram.cross(array(x), array(y), "float64"))
    assert (np.abs(wide - x.astype(float).T @ y) <= 100 * 2.2e-16 * size).all()


def test_cross_with_itself_takes_transposed_views(array):
    a = array(np.random.default_rng(0).standard_normal((7, 3000)), "float32")
    own = to_numpy(gram.cross(a.mT, a.mT))
    assert np.abs(own - to_numpy(gram.cross(a.mT, a.mT, "float64"))).max() < 8 * 6e-8 * 3300  # |a_i|^2 is about 3000


def test_cross_is_batched(array):
    x = array(np.random.default_rng(0).standard_normal((4, 50, 3)), "float32")
    got = to_numpy(gram.cross(x, x))
    assert all(np.array_equal(got[i], to_numpy(gram.cross(x[i], x[i]))) for i in range(4))


@pytest.mark.filterwarnings("error")
def test_overflow_is_a_value_not_a_warning(array):
    assert np.isinf(to_numpy(gram.cross(array([[1e30]], "float32"), array([[1e30]], "float32")))).all()
    assert gram.spectrum(array([[1e30]], "float32"), array([[1.0]], "float32"), gram.FP32) is None


@pytest.mark.parametrize("factors", [([[1e-20]], [[1.0]]), ([[1e-20]], [[1e-20]]), ([[1.0, 1.0]], [[1.0], [1e-20]])])
def test_underflow_is_noticed(array, factors):
    b, a = (array(x, "float32") for x in factors)
    assert gram.spectrum(b, a, gram.FP32) is None
    found = gram.spectrum(b, a, gram.FP64)
    assert float(found.s[0]) == pytest.approx(
        float((np.array(factors[0]) @ np.array(factors[1]))[0, 0]), rel=1e-6, abs=0
    )
    assert found.noise > 0


def test_a_zero_factor_is_told_from_an_underflow(array):
    zero, one = array(np.zeros((3, 2)), "float32"), array(np.ones((2, 4)), "float32")
    for b, a in ((zero, one), (one.mT, zero.mT), (zero, zero.mT)):
        found = gram.spectrum(b, a, gram.FP32)
        assert found.noise == 0
        assert not to_numpy(found.s).any()


def test_spectrum_of_known_singular_values(array):
    rng = np.random.default_rng(0)
    (u, _), (v, _) = np.linalg.qr(rng.standard_normal((40, 5))), np.linalg.qr(rng.standard_normal((30, 5)))
    s = np.array([5.0, 4, 3, 2, 1])
    mix = rng.standard_normal((5, 5))
    b, a = u * s @ mix, np.linalg.solve(mix, v.T)
    found = gram.spectrum(array(b), array(a), gram.FP64, scale=-2.0)
    assert np.abs(to_numpy(found.s) ** 2 - 4 * s**2).max() <= found.noise


def test_channels_of_unequal_size_do_no_harm(array):
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((40, 8)), rng.standard_normal((8, 30))
    stretch = 10.0 ** np.arange(-8, 8, 2)
    plain, odd = (
        gram.spectrum(array(x, "float32"), array(y, "float32"), gram.FP32)
        for x, y in ((b, a), (b * stretch, a / stretch[:, None]))
    )
    assert odd.noise == pytest.approx(plain.noise, rel=1e-5)
    assert np.abs(to_numpy(odd.s) - to_numpy(plain.s)).max() < 1e-5 * float(plain.s[0])  # fp32 rounding of new entries
