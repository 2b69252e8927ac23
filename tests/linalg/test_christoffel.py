"""The bounds against the truth, at every step of the Krylov space."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.linalg import christoffel
from loratools.linalg.christoffel import shares
from loratools.linalg.krylov import Krylov, begin, extend
from loratools.linalg.namespace import to_numpy

K, B = 5, 8


def problem(seed: int, spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return G with the given eigenvalues and K unit vectors: near eigenvectors, mixed, and at random."""
    rng = np.random.default_rng(seed)
    x, _ = np.linalg.qr(rng.standard_normal((len(spectrum),) * 2))
    mix = rng.standard_normal((len(spectrum), K)) * 0.03
    mix[-1, 0] = mix[-3, 1] = mix[5, 2] = mix[-6, 3] = mix[-7, 3] = 1.0
    h, _ = np.linalg.qr(x @ mix)
    return (x * spectrum) @ x.T, h


def grown(g: np.ndarray, h: np.ndarray, steps: int) -> Krylov:
    rng = np.random.default_rng(9)
    return extend(lambda v: g @ v, begin(np.concatenate([h, rng.standard_normal((len(g), B - K))], axis=1)), steps)


SPECTRA = {
    "decaying": np.sort(np.arange(1, 121) ** -1.0),
    "noise": np.sort(np.linalg.svd(np.random.default_rng(0).standard_normal((120, 150)), compute_uv=False) ** 2),
    "spiked": np.concatenate([np.linspace(0.5, 1, 112), [2, 3, 5, 8, 13, 21, 34, 55]]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("divided", [False, True])
def test_bounds_hold_at_every_step(name: str, divided: bool) -> None:
    g, h = problem(1, SPECTRA[name])
    mu, x = np.linalg.eigh(g)
    truth = (np.abs(x.T @ h) / np.sqrt(mu if divided else 1 + 0 * mu)[:, None]).max(axis=0)
    before = np.full(K, np.inf)
    for steps in range(1, 15):
        space = grown(g, h, steps)
        found = shares(space, space.basis.T @ h, divided=divided)
        tol = 1e-9 * truth.max()  # fp64: N eps over the smallest gap of the spectrum, about 1e-10
        assert (found.upper >= truth - tol).all(), steps
        assert (found.lower <= truth + tol).all(), steps
        assert (found.upper <= before + 1e-3 * truth.max()).all() or np.isinf(found.upper).all()  # up to the grid
        before = found.upper
    near = [0, 1, 2, 3]  # mostly in one or two eigenvectors; the last one is spread over all
    assert divided or np.allclose(found.upper[near], truth[near], rtol=5e-3)


@pytest.mark.parametrize("name", SPECTRA)
def test_both_libraries_and_a_short_dtype(array, name: str) -> None:
    g, h = problem(2, SPECTRA[name])
    truth = np.abs(np.linalg.eigh(g)[1].T @ h).max(axis=0)
    small, heads = array(g, "float32"), array(h, "float32")
    rng = np.random.default_rng(9)
    start = array(np.concatenate([h, rng.standard_normal((len(g), B - K))], axis=1), "float32")
    space = extend(lambda v: small @ v, begin(start), 10)
    xp_c = array(to_numpy(space.basis).astype(float).T @ h)
    found = shares(space, xp_c)
    assert heads.shape == h.shape
    # fp32 relation: residual about 120 eps over gaps of about 1e-3 |G|
    assert (to_numpy(found.upper) >= truth - 2e-2).all()
    assert (to_numpy(found.lower) <= truth + 2e-2).all()


def test_exact_once_the_space_is_invariant() -> None:
    """h in the span of four eigenvectors: after a few steps both bounds are the cosines themselves."""
    rng = np.random.default_rng(3)
    x, _ = np.linalg.qr(rng.standard_normal((60, 60)))
    mu = np.concatenate([np.linspace(1, 2, 56), [4, 6, 9, 13]])
    h = x[:, -4:] @ np.linalg.qr(rng.standard_normal((4, 4)))[0]
    start = np.concatenate([h, rng.standard_normal((60, 4))], axis=1)
    space = extend(lambda v: (x * mu) @ (x.T @ v), begin(start), 6)
    found = shares(space, space.basis.T @ h)
    truth = np.abs(x.T @ h).max(axis=0)
    assert np.allclose(found.upper, truth, atol=1e-6)
    assert np.allclose(found.lower, truth, atol=1e-6)


def test_a_repeated_eigenvalue_counts_as_one_direction() -> None:
    """Singular vectors inside an eigenspace are arbitrary: the bound is the projection on all of it."""
    rng = np.random.default_rng(4)
    x, _ = np.linalg.qr(rng.standard_normal((80, 80)))
    mu = np.concatenate([np.linspace(1, 2, 77), [9, 9, 9]])
    h = (x[:, -3:] @ np.array([[1.0], [1.0], [1.0]]) / np.sqrt(3) * 0.8) + 0.6 * x[:, :1]
    space = extend(lambda v: (x * mu) @ (x.T @ v), begin(np.concatenate([h, rng.standard_normal((80, 7))], axis=1)), 6)
    assert np.allclose(shares(space, space.basis.T @ h).upper, 0.8, atol=1e-3)  # the rest of 0.6 shares no atom with it


def test_unknown_lower_edge_bounds_nothing() -> None:
    """Over sqrt(mu), small eigenvalues matter: while they are not known to be positive the bound is infinite."""
    g, h = problem(5, np.concatenate([np.zeros(30), np.linspace(0.5, 1, 90)]))
    space = grown(g, h, 4)
    assert np.isinf(shares(space, space.basis.T @ h, divided=True).upper).all()


def test_a_finer_grid_adds_no_more_than_the_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, spectrum in enumerate(SPECTRA.values()):
        g, h = problem(seed, spectrum)
        for steps in (3, 6, 10):
            space = grown(g, h, steps)
            c = space.basis.T @ h
            usual = shares(space, c)
            with monkeypatch.context() as finer:
                finer.setattr(christoffel, "NODES", tuple(np.linspace(0.005, 0.995, 99)))
                best = shares(space, c)
            assert (best.upper <= usual.upper + usual.slack + 1e-3).all()


def test_dependent_columns_go_through_qr(monkeypatch: pytest.MonkeyPatch) -> None:
    g, h = problem(6, SPECTRA["decaying"])
    space = grown(g, h, 6)
    c = space.basis.T @ h
    quick = shares(space, c).upper
    monkeypatch.setattr(christoffel, "STEEP", 2.0)  # no diagonal passes
    assert np.allclose(quick, shares(space, c).upper, atol=1e-8)
