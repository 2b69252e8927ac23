from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.linalg import orth
from loratools.linalg.namespace import dtype_name, to_numpy

EPS = {"float32": 1.2e-7, "float64": 2.2e-16}


def defect(q) -> float:
    q = to_numpy(q).astype(np.float64)
    return float(np.abs(q.mT @ q - np.eye(q.shape[-1])).max())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 60), st.sampled_from(["float32", "float64"]), st.sampled_from([0, 4, 9, 20]))
def test_the_result_is_orthonormal_and_spans_the_columns(array, c, extra, dtype, decades):
    rng = np.random.default_rng(c + extra)
    y = rng.standard_normal((c + extra, c)) @ np.diag(np.logspace(0, -decades, c)) @ rng.standard_normal((c, c))
    q = orth.orthonormalise(array(y, dtype))
    assert dtype_name(q) == dtype
    assert defect(q) < 4 * c * EPS[dtype]
    y, q = y.astype(dtype).astype(float), to_numpy(q).astype(float)
    assert np.abs(y - q @ (q.T @ y)).max() < 20 * c * EPS[dtype] * np.linalg.norm(y)  # backward stable


def test_the_span_equals_scipys_and_a_known_one(array):
    y = np.random.default_rng(0).standard_normal((50, 7))
    q, other = to_numpy(orth.orthonormalise(array(y))), scipy.linalg.orth(y)
    assert np.abs(q @ q.T - other @ other.T).max() < 100 * 2.2e-16
    plane = to_numpy(orth.orthonormalise(array([[3.0, 1.0], [4.0, 1.0], [0.0, 0.0]])))
    assert np.abs(plane @ plane.T - np.diag([1, 1, 0])).max() < 10 * 2.2e-16


@pytest.mark.parametrize("y", [np.zeros((9, 4)), np.ones((9, 4)), np.eye(9)[:, [1, 1, 2, 3]]])
def test_dependent_columns_are_replaced(array, y):
    assert defect(orth.orthonormalise(array(y))) < 20 * 2.2e-16
    assert defect(orth.orthonormalise(array(y, "float32"))) < 20 * 1.2e-7


def test_columns_beyond_cholesky_fall_back_to_householder(array):
    x = np.vander(np.linspace(0, 1, 40), 12)  # condition about 1e9: its Gram matrix has none left
    assert orth._cholesky_qr2(array(x)) is None
    assert defect(orth.orthonormalise(array(x))) < 50 * 2.2e-16


def test_a_batch_equals_a_loop(array):
    y = np.random.default_rng(0).standard_normal((2, 3, 20, 5))
    whole = to_numpy(orth.orthonormalise(array(y)))
    for i in np.ndindex(2, 3):
        assert np.abs(whole[i] - to_numpy(orth.orthonormalise(array(y[i])))).max() < 100 * 2.2e-16


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_against_a_basis(array, dtype):
    rng = np.random.default_rng(0)
    basis = orth.orthonormalise(array(rng.standard_normal((30, 6)), dtype))
    y = rng.standard_normal((30, 4))
    inside = to_numpy(basis) @ rng.standard_normal((6, 4))
    for new in (y, inside, inside + 1e-6 * y, np.zeros((30, 4))):
        q = to_numpy(orth.orthonormalise_against(basis, array(new, dtype)))
        assert defect(np.concatenate([to_numpy(basis), q], axis=1)) < 40 * EPS[dtype]
    q = to_numpy(orth.orthonormalise_against(basis, array(y, dtype))).astype(float)
    whole = np.concatenate([to_numpy(basis).astype(float), q], axis=1)
    assert np.abs(y - whole @ (whole.T @ y)).max() < 100 * EPS[dtype]
