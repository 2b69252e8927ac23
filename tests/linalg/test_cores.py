from __future__ import annotations

import numpy as np
import pytest

from loratools.linalg import cores, select
from loratools.linalg.gram import FP32, FP64
from loratools.linalg.namespace import to_numpy


def one(b, a, precision, scale=1.0):
    """The spectrum of one product, and the size of its errors."""
    found = cores.spectra([(b, a)], [scale], precision)
    return to_numpy(found.s)[0], float(found.noise[0])


@pytest.mark.filterwarnings("error")
def test_overflow_breaks_down_without_a_warning(array):
    assert np.isnan(one(array([[1e30]], "float32"), array([[1.0]], "float32"), FP32)[1])


@pytest.mark.parametrize("factors", [([[1e-20]], [[1.0]]), ([[1e-20]], [[1e-20]]), ([[1.0, 1.0]], [[1.0], [1e-20]])])
def test_underflow_is_noticed(array, factors):
    b, a = (array(x, "float32") for x in factors)
    assert np.isnan(one(b, a, FP32)[1])
    s, noise = one(b, a, FP64)
    assert s[0] == pytest.approx(float((np.array(factors[0]) @ np.array(factors[1]))[0, 0]), rel=1e-6, abs=0)
    assert noise > 0


@pytest.mark.parametrize("factors", [(1e-170, 1.0), (1.0, 1e-170), (1e-170, 1e-170)])
def test_underflow_of_fp64_is_noticed(array, factors):
    b, a = (array([[x]], "float64") for x in factors)
    assert np.isnan(one(b, a, FP64)[1])


def test_a_zero_factor_is_told_from_an_underflow(array):
    zero, ones = array(np.zeros((3, 2)), "float32"), array(np.ones((2, 4)), "float32")
    for b, a in ((zero, ones), (ones.mT, zero.mT), (zero, zero.mT)):
        s, noise = one(b, a, FP32)
        assert noise == 0
        assert not s.any()


def test_spectrum_of_known_singular_values(array):
    rng = np.random.default_rng(0)
    (u, _), (v, _) = np.linalg.qr(rng.standard_normal((40, 5))), np.linalg.qr(rng.standard_normal((30, 5)))
    s = np.array([5.0, 4, 3, 2, 1])
    mix = rng.standard_normal((5, 5))
    b, a = u * s @ mix, np.linalg.solve(mix, v.T)
    found, noise = one(array(b), array(a), FP64, scale=-2.0)
    assert np.abs(found**2 - 4 * s**2).max() <= noise


def test_channels_of_unequal_size_do_no_harm(array):
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((40, 8)), rng.standard_normal((8, 30))
    stretch = 10.0 ** np.arange(-8, 8, 2)
    (plain, noise), (odd, more) = (
        one(array(x, "float32"), array(y, "float32"), FP32) for x, y in ((b, a), (b * stretch, a / stretch[:, None]))
    )
    assert more == pytest.approx(noise, rel=1e-5)
    assert np.abs(odd - plain).max() < 1e-5 * float(plain[0])  # fp32 rounding of new entries


def mixed(array):
    """Products of one form: plain, zero, of deficient rank, too large for fp32 sums, too small for them."""
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((40, 6)), rng.standard_normal((6, 30))
    low = np.concatenate([a[:3], a[:3]])
    pairs = [(b, a), (0 * b, a), (b, 0 * a), (b, low), (1e25 * b, a), (1e-25 * b, a), (2 * b, -a)]
    return [(array(x, "float32"), array(y, "float32")) for x, y in pairs]


@pytest.mark.parametrize("precision", [FP32, FP64])
def test_a_batch_gives_everyone_what_it_would_get_alone(array, precision):
    pairs, scales = mixed(array), [1.0, 2.0, 1.0, -3.0, 1.0, 1.0, 0.5]
    found = cores.spectra(pairs, scales, precision)
    for i, (pair, scale) in enumerate(zip(pairs, scales, strict=True)):
        alone = cores.spectra([pair], [scale], precision)
        for mine, single in zip(found, alone, strict=True):
            assert np.array_equal(to_numpy(mine)[i], to_numpy(single)[0], equal_nan=True)


def test_the_broken_and_the_zero_are_never_trusted(array):
    found = cores.spectra(mixed(array), [1.0] * 7, FP32)
    fine = cores.trusted(found.s, found.noise, [2] * 7, [lambda s: 2] * 7)
    noise = to_numpy(found.noise)
    assert np.isnan(noise[4:6]).all()
    assert not noise[1:3].any()
    assert fine == [True, False, False, True, False, False, True]


def test_figures_are_those_of_single_spectra(array):
    rng = np.random.default_rng(0)
    s = -np.sort(-(10.0 ** rng.uniform(-12, 3, (6, 9))), axis=1)
    s[5] = 0
    ranks = [1, 3, 9, 8, 2, 4]
    for (energy, error), row, k in zip(cores.figures(array(s), ranks), s, ranks, strict=True):
        assert energy == pytest.approx(select.energy_kept(row, k), abs=1e-15)
        assert error == pytest.approx(select.tail_error(row, k), rel=1e-13)


def alone(values, noise, k):
    """Is one spectrum trusted at a fixed rank?"""
    (told,) = cores.trusted(np.array([values]), np.array([noise]), [k], [lambda s: k])
    return told


def test_noise_inside_many_kept_directions_costs_error():
    s = [0.1**0.5] * 65  # 64 kept; the drift n^2 640 moves the error of the cut by n^2 640 / (2 sqrt(0.1))
    assert not alone(s, 0.99e-4, 64)
    assert alone(s, 1e-6, 64)


def test_a_tail_of_one_value_errs_by_that_value_alone():
    s = [0.1**0.5] * 64 + [0.1]  # the tail 0.01 is 1e4 times the noise of one value, and 160 times that of 64
    assert alone(s, 1e-6, 64)


def test_a_tail_below_the_noise_is_not_told():
    assert not alone([1.0] * 8 + [1e-4] * 8, 1e-7, 8)
