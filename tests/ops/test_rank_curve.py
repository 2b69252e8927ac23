"""Prefixes against the optimum, and areas with known values."""

from __future__ import annotations

from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.linalg.channels import channels
from loratools.ops.rank_curve import area, joined_curve, rank_curve


def test_a_constant_curve_has_its_height() -> None:
    assert area([1, 2, 4, 8], [0.3] * 4) == pytest.approx(0.3)
    assert area([log2(r) for r in (1, 2, 4, 8)], [0.3] * 4) == pytest.approx(0.3)
    assert area([1], [0.7]) == 0.7


def test_linear_in_log2_has_the_mean_of_its_ends() -> None:
    ranks = [1, 2, 4, 8, 16]
    assert area([log2(r) for r in ranks], [0.1 * log2(r) + 0.2 for r in ranks]) == pytest.approx((0.2 + 0.6) / 2)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_against_dense_slices(m: int, n: int, r: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((m, r)), rng.standard_normal((r, n))
    found = rank_curve(channels(b, a, 2.0))
    whole = np.linalg.norm(b @ a)
    expected = [np.linalg.norm(b @ a - b[:, :k] @ a[:k]) / whole for k in range(1, r + 1)]
    # sqrt(eps) of the norm of the factors: the tail is a difference of Gram products
    assert np.allclose(found["prefix_error"], expected, atol=1e-7 * np.linalg.norm(b) * np.linalg.norm(a) / whole)
    s = np.linalg.svd(b @ a, compute_uv=False)
    best = [np.linalg.norm(s[k:]) / whole for k in range(1, r + 1)]
    assert np.allclose(found["optimal_error"], best, atol=1e-7)
    assert all(o <= p + 1e-6 for o, p in zip(found["optimal_error"], found["prefix_error"], strict=True))
    assert found["aurac"] <= found["aurac_optimal"] + 1e-6


def test_singular_vectors_as_channels_are_optimal() -> None:
    rng = np.random.default_rng(0)
    u, s, vh = np.linalg.svd(rng.standard_normal((20, 15)), full_matrices=False)
    found = rank_curve(channels(u * s, vh))
    assert np.allclose(found["prefix_error"], found["optimal_error"], atol=1e-7)
    assert found["prefix_error"][-1] < 1e-7


def test_joined_curves_are_those_of_the_block_diagonal_update() -> None:
    rng = np.random.default_rng(1)
    pairs = [(rng.standard_normal((9, r)), rng.standard_normal((r, 7))) for r in (2, 4)]
    rows = [{"frobenius_norm": float(np.linalg.norm(b @ a)), **rank_curve(channels(b, a))} for b, a in pairs]
    found = joined_curve([*rows, {"frobenius_norm": 1.0}])  # a vector has no curve
    assert found is not None
    whole = np.sqrt(sum(np.linalg.norm(b @ a) ** 2 for b, a in pairs))
    for r in range(1, 5):
        wrong = np.sqrt(sum(np.linalg.norm(b[:, r:] @ a[r:]) ** 2 for b, a in pairs))
        assert found["prefix_error"][r - 1] == pytest.approx(wrong / whole, abs=1e-7)
    assert found["ranks"] == [1, 2, 3, 4]
    assert found["aurac"] == pytest.approx(area(found["ranks"], [1 - e for e in found["prefix_error"]]))
    assert joined_curve([{"frobenius_norm": 1.0}]) is None


def test_zero_update() -> None:
    found = rank_curve(channels(np.zeros((4, 3)), np.ones((3, 5))))
    assert found["prefix_error"] == found["optimal_error"] == [0.0] * 3
    assert found["aurac"] == 1.0
