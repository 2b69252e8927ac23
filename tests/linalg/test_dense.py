from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from loratools.errors import UsageError
from loratools.linalg.dense import dense_svd, thin_svd
from loratools.linalg.namespace import dtype_name, to_numpy


def decaying(m, n, rate, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((d, min(m, n))))[0] for d in (m, n))
    return u * np.exp(-rate * np.arange(min(m, n))) @ v.T


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (1, 7), (7, 1)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_thin_svd_is_exact(array, shape, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    u, s, vh = map(to_numpy, thin_svd(array(x)))
    eps = 2.2e-16 if dtype == "float64" else 1.2e-7
    assert s.dtype == ("float64" if dtype == "float64" else "float32")
    assert np.abs(s - scipy.linalg.svdvals(x.astype(float))).max() < 20 * eps * s[0]
    assert np.abs(u * s @ vh - x).max() < 20 * eps * s[0]
    assert np.abs(u.T @ u - np.eye(len(s))).max() < 20 * eps


def test_thin_svd_is_batched(array):
    x = np.random.default_rng(0).standard_normal((4, 6, 5))
    assert np.abs(to_numpy(thin_svd(array(x)).s) - np.linalg.svd(x, compute_uv=False)).max() < 100 * 2.2e-16


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_dense_svd_finds_the_leading_part(array, shape):
    x = decaying(*shape, rate=0.5)
    found = dense_svd(array(x), 5, seed=3)
    u, s, vh = map(to_numpy, found)
    # the sketch holds 15 directions; the spectrum beyond falls by e^-7.5 in each of 2 power steps
    assert np.abs(s - np.exp(-0.5 * np.arange(5))).max() < 1e-9
    assert np.linalg.norm(x - u * s @ vh) <= np.linalg.norm(np.exp(-0.5 * np.arange(5, 40))) * (1 + 1e-9)
    assert dtype_name(found.u) == "float64"


def test_dense_svd_repeats_itself_and_leaves_the_global_state_alone(array):
    x = array(np.random.default_rng(0).standard_normal((50, 40)), "float32")
    np.random.seed(11)
    before = np.random.get_state()
    first, second, third = dense_svd(x, 4, seed=0), dense_svd(x, 4, seed=0), dense_svd(x, 4, seed=1)
    after = np.random.get_state()
    assert before[0] == after[0]
    assert np.array_equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert np.array_equal(to_numpy(first.u), to_numpy(second.u))
    assert not np.array_equal(to_numpy(first.u), to_numpy(third.u))


@pytest.mark.parametrize("k", [0, 5])
def test_dense_svd_refuses_ranks_outside(array, k):
    with pytest.raises(UsageError):
        dense_svd(array(np.ones((4, 6))), k, seed=0)
