"""Block Lanczos and leading triples against dense decompositions in fp64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import NumericsError, UsageError
from loratools.linalg.krylov import begin, extend, leading, ritz
from loratools.linalg.namespace import to_numpy

EPS32 = 2.0**-23


def sample(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Noise with a few larger directions, as trained weights have."""
    left, right = rng.standard_normal((m, 5)), rng.standard_normal((5, n))
    return rng.standard_normal((m, n)) + (left * np.arange(5, 0, -1)) @ right * 0.2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_krylov_relation_holds(array, dtype: str) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((90, 70))
    g = a @ a.T
    w = array(a, dtype)
    space = extend(lambda x: w @ (w.T @ x), begin(array(rng.standard_normal((90, 8)), dtype)), 5)
    q, t, last, coupling = (to_numpy(x).astype(float) for x in (space.basis, space.t, space.following, space.coupling))
    assert q.shape == (90, 40)
    both = np.concatenate([q, last], axis=1)
    # a few roundings of the dtype per entry, over 90 terms
    tol = 90 * (EPS32 if dtype == "float32" else 2.0**-52)
    assert np.abs(both.T @ both - np.eye(48)).max() < tol
    residual = g @ q - q @ t
    residual[:, -8:] -= last @ coupling
    assert np.linalg.norm(residual) < tol * np.linalg.norm(g)
    assert np.abs(t - np.tril(np.triu(t, -15), 15)).max() < tol * np.linalg.norm(g)  # block tridiagonal


def test_ritz_residuals_are_true_residuals() -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((60, 60))
    g = a @ a.T
    space = extend(lambda x: g @ x, begin(rng.standard_normal((60, 4))), 6)
    theta, z, rho = ritz(space)
    x = space.basis @ z
    assert np.allclose(np.linalg.norm(g @ x - x * theta, axis=0), rho, atol=1e-10 * theta[-1])  # 60 eps |G|, generous


@pytest.mark.parametrize("shape", [(200, 200), (300, 120), (120, 300), (12, 40), (500, 11)])
def test_leading_triples(array, shape: tuple[int, int]) -> None:
    a = sample(np.random.default_rng(2), *shape).astype(np.float32)
    found = leading(array(a), 10, key=(1, 2))
    u, s, _ = np.linalg.svd(a.astype(float), full_matrices=False)
    fu, fs, fvh = (to_numpy(x).astype(float) for x in found[:3])
    assert fu.shape == (shape[0], 10)
    assert fvh.shape == (10, shape[1])
    assert np.allclose(fs, s[:10], rtol=1e-5)  # the error of a value is the square of its vector's
    angle = to_numpy(found.angle)
    wrong = np.linalg.norm(fu - u[:, :10] * np.sign((fu * u[:, :10]).sum(0)), axis=0)
    assert (wrong <= 3 * angle + 50 * EPS32 * s[0] / np.abs(np.diff(s[:11])).min()).all()
    assert np.linalg.norm(a.T.astype(float) @ fu - fvh.T * fs) < 1e-4 * s[0]
    assert to_numpy(found.residual).max() < 1e-3


def test_neighbours_too_close_are_said_to_be(array) -> None:
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.standard_normal((1200, 6)))[0] for _ in range(2))
    a = (u * [5, 4, 3, 3 * (1 - 1e-9), 2, 1]) @ v.T  # the third and fourth are one plane, to fp32
    found = leading(array(a.astype(np.float32)), 5, key=(1, 2), max_columns=256)
    angle = to_numpy(found.angle)
    assert (angle[[0, 1, 4]] < 1e-3).all()
    assert (angle[[2, 3]] > 0.1).all()


def test_libraries_agree() -> None:
    torch = pytest.importorskip("torch")
    a = sample(np.random.default_rng(4), 200, 150)
    ours, theirs = leading(a, 5, key=(1, 2)), leading(torch.from_numpy(a), 5, key=(1, 2))
    assert np.allclose(ours.s, to_numpy(theirs.s), rtol=1e-9)  # fp64; angle 1e-3 squared, and converged far beyond
    assert np.allclose(np.abs((ours.u * to_numpy(theirs.u)).sum(0)), 1, atol=1e-6)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_any_shape(m: int, n: int, seed: int) -> None:
    a = np.random.default_rng(seed).standard_normal((m, n))
    k = min(m, n)
    found = leading(a, k, key=(1, 2))
    assert np.allclose(found.s, np.linalg.svd(a, compute_uv=False), atol=1e-12 * (m + n))
    assert np.allclose((found.u * found.s) @ found.vh, a, atol=1e-12 * (m + n))


def test_zero_matrix() -> None:
    found = leading(np.zeros((300, 200), np.float32), 3, key=(1, 2))
    assert (found.s == 0).all()
    assert np.isfinite(found.u).all()


@pytest.mark.parametrize("k", [0, 31])
def test_impossible_counts(k: int) -> None:
    with pytest.raises(UsageError, match="no such singular vectors"):
        leading(np.ones((30, 40), np.float32), k, key=(1, 2))


@pytest.mark.parametrize("side", [50, 300])
def test_not_finite(side: int) -> None:
    a = np.ones((side, side), np.float32)
    a[3, 4] = np.nan
    with pytest.raises(NumericsError, match="not finite"):
        leading(a, 2, key=(1, 2))
