from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.leaf import Leaf
from loratools.linalg.namespace import to_numpy
from loratools.linalg.row_norms import norms, row_norms, row_norms_many

Library = Callable[[Any], Any]


def exact(w: Any, b: Any, a: Any, s: float) -> Any:
    return np.linalg.norm(w.astype(np.float64) + s * b.astype(np.float64) @ a.astype(np.float64), axis=1)


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 600),
    n=st.integers(1, 70),
    r=st.integers(1, 5),
    s=st.sampled_from([0.0, 0.5, -2.0]),
    half=st.booleans(),
)
def test_within_1e_6_of_float64(m: int, n: int, r: int, s: float, half: bool) -> None:
    rng = np.random.default_rng(m + n)
    w = rng.standard_normal((m, n)).astype(ml_dtypes.bfloat16 if half else np.float32)
    b, a = rng.standard_normal((m, r)).astype(np.float32), rng.standard_normal((r, n)).astype(np.float32)
    true = exact(w, b, a, s)
    # eps of each product of the row, relative to the sizes that enter it
    size = np.linalg.norm(w.astype(np.float64), axis=1) + abs(s) * np.linalg.norm(b, axis=1) * np.linalg.norm(a)
    assert np.all(np.abs(row_norms(w, b, a, scale=s) - true) <= 1e-6 * true + 4e-7 * size)


def test_both_libraries_and_stored_weights(library: Library) -> None:
    rng = np.random.default_rng(0)
    w, b, a = rng.standard_normal((300, 40)), rng.standard_normal((300, 3)), rng.standard_normal((3, 40))
    found = row_norms_many([library(w)], [library(b)], [library(a)], [0.5])[0]
    assert np.allclose(to_numpy(found), exact(w, b, a, 0.5), rtol=1e-13)  # fp64
    leaf = Leaf(w.shape, "float64", lambda out: w)
    assert np.allclose(row_norms(leaf, b, a, scale=0.5), exact(w, b, a, 0.5), rtol=1e-13)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_squares_beyond_fp32(size: float) -> None:
    x = np.full((3, 5), size, np.float32)
    assert np.allclose(norms(x), np.sqrt(5) * size, rtol=1e-6)
    assert norms(np.zeros((2, 3), np.float32)).tolist() == [0.0, 0.0]
