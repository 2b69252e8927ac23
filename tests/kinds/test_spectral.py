"""Sparse coefficients in fast bases against the same matrices formed by hand; circulant blocks by frequencies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loratools.core import generic
from loratools.core.generic import transposed
from loratools.kinds.circulant import Circulant
from loratools.kinds.fourier import Fourier
from loratools.kinds.lowrank import low_rank
from loratools.kinds.wavelet import Wavelet
from loratools.linalg import wavelets

RNG = np.random.default_rng(5)
SHAPES = [(12, 8), (8, 13), (9, 9), (7, 40)]


def places(shape: tuple[int, int], n: int) -> tuple[Any, Any]:
    flat = np.random.default_rng(n).permutation(shape[0] * shape[1])[:n]
    return flat // shape[1], flat % shape[1]


def fourier(shape: tuple[int, int], n: int) -> Fourier:
    return Fourier(RNG.standard_normal(n).astype(np.float32), *places(shape, n), shape, 50.0)


def wavelet(shape: tuple[int, int], n: int, name: str = "db2") -> Wavelet:
    taps = wavelets.LOW_PASS[name]
    rows, columns = places((wavelets.count(shape[0], taps), wavelets.count(shape[1], taps)), n)
    return Wavelet(RNG.standard_normal(n).astype(np.float32), rows, columns, shape, 3.0, taps)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 5, 40])
def test_frequencies_are_those_of_ifft2(shape: tuple[int, int], n: int) -> None:
    u = fourier(shape, n)
    s = np.zeros(shape)
    s[u.rows, u.columns] = u.spectrum
    true = 50.0 * np.fft.ifft2(s).real
    assert np.abs(u.dense() - true).max() <= 1e-6 * np.abs(true).max()
    assert np.linalg.matrix_rank(true, tol=1e-10) <= min(2 * n, *shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [fourier, wavelet])
def test_factors_are_exact_and_of_the_bounded_rank(shape: tuple[int, int], make: Any) -> None:
    u = make(shape, 3)
    flat = u.factored()
    assert flat.rank <= (6 if isinstance(u, Fourier) else 3)
    assert np.abs(flat.dense() - u.dense()).max() <= 2e-6 * np.abs(u.dense()).max()
    assert low_rank(u) is not None
    assert low_rank(make(shape, 60)) is None  # as large as the update itself: products are cheaper


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [fourier, wavelet])
def test_transposed_is_the_transpose(shape: tuple[int, int], make: Any) -> None:
    u = make(shape, 9)
    assert np.abs(transposed(u).dense() - u.dense().T).max() <= 1e-6 * np.abs(u.dense()).max()


def test_parseval_between_frequencies_that_mirror_each_other() -> None:
    """(1, 2) and (-1, -2) of a real update are one frequency, and 0 and n / 2 are their own mirrors."""
    rows, columns = np.array([1, 7, 0, 4, 3]), np.array([2, 4, 0, 3, 3])
    u = Fourier(np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32), rows, columns, (8, 6), 7.0)
    v = Fourier(np.array([2.0, -1.0, 0.5], np.float32), np.array([7, 0, 1]), np.array([4, 0, 2]), (8, 6), 2.0)
    assert generic.inner(u, v) == pytest.approx(float((u.dense() * v.dense()).sum()), rel=1e-5)
    assert generic.norm(u) == pytest.approx(float(np.linalg.norm(u.dense())), rel=1e-6)


@pytest.mark.parametrize("name", wavelets.LOW_PASS)
def test_filters_are_orthonormal_wavelets(name: str) -> None:
    """Even shifts of both filters are orthonormal, and the high one has no mean."""
    low, high = np.array(wavelets.LOW_PASS[name]), np.array(wavelets.high(wavelets.LOW_PASS[name]))
    for shift in range(0, len(low), 2):
        stop = len(low) - shift
        assert float(low[shift:] @ low[:stop]) == pytest.approx(float(shift == 0), abs=1e-11)
        assert float(high[shift:] @ high[:stop]) == pytest.approx(float(shift == 0), abs=1e-11)
        assert float(low[shift:] @ high[:stop]) == pytest.approx(0.0, abs=1e-11)
    assert low.sum() == pytest.approx(2**0.5, abs=1e-11)
    assert high.sum() == pytest.approx(0.0, abs=1e-11)


@pytest.mark.parametrize("name", ["db1", "db4", "coif2"])
@pytest.mark.parametrize("size", [10, 11, 40])
def test_synthesis_undoes_analysis_and_is_its_transpose(name: str, size: int) -> None:
    taps = wavelets.LOW_PASS[name]
    x, c = RNG.standard_normal((size, 3)), RNG.standard_normal((wavelets.count(size, taps), 3))
    analysed = wavelets.analysis(x, taps)
    assert np.abs(wavelets.synthesis(analysed, taps, size) - x).max() <= 1e-11  # rows of U are orthonormal
    assert float((analysed * c).sum()) == pytest.approx(float((x * wavelets.synthesis(c, taps, size)).sum()), rel=1e-10)


def test_haar_by_hand() -> None:
    """db1 on a 4 x 4 update: sums and differences of neighbours over 2."""
    h = np.kron(np.eye(2), [[1.0], [1.0]]) / 2**0.5
    g = np.kron(np.eye(2), [[1.0], [-1.0]]) / 2**0.5
    whole = np.concatenate([h, g], axis=1)
    u = Wavelet(np.array([2.0, 3.0], np.float32), np.array([0, 3]), np.array([2, 1]), (4, 4))
    s = np.zeros((4, 4))
    s[0, 2], s[3, 1] = 2.0, 3.0
    assert np.abs(u.dense() - whole @ s @ whole.T).max() <= 1e-6


@pytest.mark.parametrize(("p", "q", "b"), [(2, 3, 5), (3, 1, 4), (1, 1, 7), (2, 2, 1)])
def test_circulant_blocks(p: int, q: int, b: int) -> None:
    u = Circulant(RNG.standard_normal((p, q, b)).astype(np.float32), 0.5)
    d = u.dense()
    for m, n, j, k in np.ndindex(p, q, b, b):
        assert d[m * b + j, n * b + k] == np.float32(0.5) * u.kernel[m, n, (k - j) % b]
    assert np.allclose(generic.svdvals(u), np.linalg.svd(d.astype(np.float64), compute_uv=False), atol=1e-6)
    assert np.array_equal(transposed(u).dense(), d.T)
    other = replace(u, scale=-2.0)
    assert generic.inner(u, other) == pytest.approx(float((d * other.dense()).sum()), rel=1e-5)
