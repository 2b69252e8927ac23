"""Conversions of short floats, held against NumPy's casts bit by bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from loratools.linalg.short_floats import BLOCK, to_float16, widened

SHORT = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}


def patterns(dtype):
    """Every bit pattern of a short float."""
    width = np.dtype(dtype).itemsize
    return np.arange(1 << (8 * width), dtype=f"u{width}").view(dtype)


def cast(x, dtype):
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def by_addition(x):
    """``to_float16`` of numbers among so many small ones that it rounds by addition."""
    return to_float16(np.concatenate([x, np.full(x.size + 1, 1e-6, np.float32)]))[: x.size]


def same_bits(x, y):
    return x.dtype == y.dtype and np.array_equal(x.view(np.uint8), y.view(np.uint8))


def halfway():
    """Every fp16 number of the positive half, the fp32 numbers half-way to the next, and their neighbours.

    Those that round to infinity are left out: a block with one of them is cast as a whole.
    """
    finite = patterns(np.float16)[:0x7C00].astype(np.float64)
    middle = ((finite + np.append(finite[1:], 65536.0)) / 2).astype(np.float32)
    found = [finite.astype(np.float32), middle, *(np.nextafter(middle, np.float32(to)) for to in (0, np.inf))]
    every = np.concatenate(found)
    return every[every < 65520]


@pytest.mark.parametrize("name", SHORT)
def test_every_pattern_is_widened_as_the_cast_does(name):
    x = patterns(SHORT[name])
    got, want = widened(x, name), cast(x, np.float32)
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    assert same_bits(got[~nan], want[~nan])


@pytest.mark.parametrize("sign", [1, -1])
def test_every_boundary_of_float16_is_rounded_to_even(sign):
    x = np.float32(sign) * halfway()
    assert same_bits(by_addition(x), cast(x, np.float16))


@pytest.mark.parametrize("seed", range(3))
def test_random_numbers_of_all_sizes_are_rounded_as_the_cast_does(seed):
    rng = np.random.default_rng(seed)
    for most in (15.9, 17):  # the latter beyond fp16
        x = (rng.choice([-1, 1], 200_000) * 2.0 ** rng.uniform(-40, most, 200_000)).astype(np.float32)
        assert same_bits(to_float16(x), cast(x, np.float16))
        assert same_bits(by_addition(x), cast(x, np.float16))


@pytest.mark.parametrize("bits", [1, 0x00400000, 0x007FFFFF])
def test_subnormals_of_float32_become_signed_zeros(bits):
    x = np.array([bits, bits | 0x80000000], np.uint32).view(np.float32)
    assert same_bits(by_addition(x), np.array([0.0, -0.0], np.float16))


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 65520.0, -1e30])
def test_a_number_without_a_finite_float16_changes_no_other(special):
    x = np.linspace(-1e-4, 1e-4, 2 * BLOCK + 5, dtype=np.float32)
    x[BLOCK + 7] = special
    got = to_float16(x)
    assert np.array_equal(got, cast(x, np.float16), equal_nan=True)
    assert not np.isfinite(got[BLOCK + 7])


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 3), (BLOCK,), (BLOCK + 1,), (3, 5, 7), (2, BLOCK)])
def test_shapes(shape):
    for size in (1.0, 1e-5):
        x = (size * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
        got = to_float16(x)
        assert got.shape == shape
        assert same_bits(got, cast(x, np.float16))


@pytest.mark.parametrize(
    "view", [lambda x: x.T, lambda x: x[1::2, 3:], lambda x: x[:, ::-1], lambda x: x.transpose(1, 0)]
)
def test_views_equal_copies(view):
    x = np.random.default_rng(0).standard_normal((40, 60)).astype(np.float32)
    for size in (np.float32(1), np.float32(1e-5)):
        assert np.array_equal(to_float16(view(size * x)), cast(view(size * x), np.float16))
    short = x.astype(np.float16)
    assert np.array_equal(widened(view(short), "float16"), view(short).astype(np.float32))
