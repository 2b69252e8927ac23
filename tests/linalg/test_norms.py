from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg

from loratools.errors import UsageError
from loratools.linalg.namespace import to_numpy
from loratools.linalg.norms import frobenius, residual_error, spectral_norm
from loratools.linalg.rsvd import rsvd
from loratools.linalg.seeds import key_of

KEY = key_of(0, "test")


@pytest.mark.parametrize("shape", [(1, 1), (300, 7), (7, 300), (270, 280)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_frobenius_equals_the_dense_norm(array, shape, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    got = frobenius(array(x))
    assert got == pytest.approx(np.linalg.norm(x.astype(float)), rel=1e-12)
    assert got == pytest.approx(scipy.linalg.svdvals(x.astype(float)).dot(scipy.linalg.svdvals(x.astype(float))) ** 0.5)


@pytest.mark.parametrize("spectrum", ["steep", "1/j", "semicircle"])
def test_spectral_norm_is_a_tight_lower_bound(array, spectrum):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 150))
    if spectrum != "semicircle":
        u, _, vh = np.linalg.svd(x, full_matrices=False)
        x = u * (np.exp(-np.arange(150)) if spectrum == "steep" else 1 / np.arange(1, 151)) @ vh
    want = np.linalg.norm(x, 2)
    assert want == pytest.approx(scipy.sparse.linalg.svds(x, k=1, return_singular_vectors=False)[0], rel=1e-10)
    got = spectral_norm(array(x), KEY)
    # without a gap (the semicircle) 48 of 150 directions have been seen; elsewhere Lanczos has converged
    assert want * (1 - (1e-3 if spectrum == "semicircle" else 1e-10)) <= got <= want * (1 + 1e-13)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 5), (6, 6)])
def test_spectral_norm_of_small_matrices_is_exact(array, shape):
    x = np.random.default_rng(0).standard_normal(shape)
    assert spectral_norm(array(x), KEY) == pytest.approx(np.linalg.norm(x, 2), rel=1e-12)
    assert spectral_norm(array(np.zeros(shape)), KEY) == 0.0


def test_residual_error_estimates_the_true_error(array):
    x = np.random.default_rng(0).standard_normal((80, 60))
    found = rsvd(array(x), 10, key=KEY)
    u, s, vh = map(to_numpy, found)
    truth = np.linalg.norm(x - u * s @ vh)
    got = residual_error(array(x), found, key=key_of(1, "test"))
    assert got.estimate == pytest.approx(
        truth, rel=0.2
    )  # spread of the mean of 32, for 50 comparable directions: 2.5 %
    assert got.estimate < truth * 2 < got.bound * 2
    assert got.failure == pytest.approx(0.9**32)


def test_residual_error_of_an_exact_decomposition_is_rounding(array):
    x = np.random.default_rng(0).standard_normal((20, 15))
    got = residual_error(array(x), rsvd(array(x), 15, key=KEY), key=KEY)
    assert got.bound < 1000 * 2.2e-16 * np.linalg.norm(x)


@pytest.mark.parametrize("samples", [2, 8, 24])
def test_the_bound_fails_no_more_often_than_promised_in_the_worst_case(samples):
    """The worst matrix for signs: one direction shared by two columns, whose sample vanishes half of the time."""
    x = np.zeros((3, 4))
    x[0, :2] = 1
    nothing = rsvd(np.zeros((3, 4)), 1, key=KEY)
    trials = 400
    failures = sum(
        residual_error(x, nothing, key=key_of(i, "trial"), samples=samples).bound < np.sqrt(2) for i in range(trials)
    )
    share = 0.9**samples
    assert failures <= trials * share + 4 * np.sqrt(trials * share)  # four standard deviations of chance


def test_residual_error_needs_a_sample(array):
    x = array(np.ones((3, 4)))
    with pytest.raises(UsageError):
        residual_error(x, rsvd(x, 1, key=KEY), key=KEY, samples=0)
