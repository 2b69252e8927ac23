"""Spectrum and health of factors, from their Gram matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.linalg.channels import balance, channels, condition, dead, duplicates
from loratools.linalg.namespace import to_numpy


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_singular_values(m: int, n: int, r: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((m, r)), rng.standard_normal((r, n))
    found = channels(b, a, -0.5)
    exact = np.linalg.svd(0.5 * b @ a, compute_uv=False)[: min(m, n, r)]
    # fp64 Gram products: 1e-15 |b|^2 |a|^2 under the root, or QR
    assert np.allclose(found.s, exact, atol=1e-6 * exact[0])


def test_steep_spectra_go_by_qr(array) -> None:
    rng = np.random.default_rng(0)
    b = np.linalg.qr(rng.standard_normal((40, 6)))[0] * 10.0 ** -np.arange(0, 12, 2)
    a = np.linalg.qr(rng.standard_normal((30, 6)))[0].T
    found = to_numpy(channels(array(b), array(a)).s)
    assert np.allclose(found, 10.0 ** -np.arange(0, 12, 2), rtol=1e-4)  # QR: eps s_1 / s_6 = 1e-6


def test_dead_and_duplicate_channels(array) -> None:
    rng = np.random.default_rng(1)
    b, a = rng.standard_normal((20, 6)), rng.standard_normal((6, 25))
    b[:, 1] = 0.0  # dead
    a[4] = 0.0  # dead, too
    b[:, 3], a[3] = -2 * b[:, 0], 0.1 * a[0]  # the direction of channel 0
    b[:, 5] = b[:, 2]  # the same column, another row: no duplicate
    found = channels(array(b.astype(np.float32)), array(a.astype(np.float32)))
    assert dead(found) == 2
    assert duplicates(found) == 1


def test_balance_and_condition(array) -> None:
    q = np.linalg.qr(np.random.default_rng(2).standard_normal((30, 4)))[0]
    found = channels(array(q * [8.0, 4.0, 2.0, 1.0]), array(q.T))
    assert condition(found.gb) == pytest.approx(8.0)
    assert condition(found.ga) == pytest.approx(1.0)
    assert balance(found) == pytest.approx(85**0.5 / 2)
    singular = channels(array(np.ones((5, 2))), array(np.zeros((2, 5))))
    assert condition(singular.gb) is None
    assert balance(singular) is None


def test_not_finite() -> None:
    b = np.ones((5, 2), np.float32)
    b[0, 0] = np.nan
    assert channels(b, np.ones((2, 5), np.float32)).s.shape == (0,)
