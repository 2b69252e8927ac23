from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.linalg import gram
from loratools.linalg.namespace import dtype_name, to_numpy

SIZES = st.sampled_from([1, 2, 5, 2047, 2048, 2049, 4100])


@settings(max_examples=20, deadline=None)
@given(SIZES, st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_cross_is_the_inner_product_of_columns(array, n, r, s, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, r)).astype(np.float32), rng.standard_normal((n, s)).astype(np.float32)
    got = gram.cross(array(x), array(y))
    size = np.linalg.norm(x, axis=0)[:, None] * np.linalg.norm(y, axis=0)
    assert dtype_name(got) == "float64"
    # fp32 sums of at most 2048 terms in blocks and lanes: a few eps of the sizes
    assert (np.abs(to_numpy(got) - x.astype(float).T @ y) <= 8 * 6e-8 * size).all()
    wide = to_numpy(gram.cross(array(x), array(y), "float64"))
    assert (np.abs(wide - x.astype(float).T @ y) <= 100 * 2.2e-16 * size).all()


def test_cross_with_itself_takes_transposed_views(array):
    a = array(np.random.default_rng(0).standard_normal((7, 3000)), "float32")
    own = to_numpy(gram.cross(a.mT, a.mT))
    assert np.abs(own - to_numpy(gram.cross(a.mT, a.mT, "float64"))).max() < 8 * 6e-8 * 3300  # |a_i|^2 is about 3000


def test_cross_is_batched(array):
    x = array(np.random.default_rng(0).standard_normal((4, 50, 3)), "float32")
    got = to_numpy(gram.cross(x, x))
    assert all(np.array_equal(got[i], to_numpy(gram.cross(x[i], x[i]))) for i in range(4))


@pytest.mark.filterwarnings("error")
def test_overflow_is_a_value_not_a_warning(array):
    assert np.isinf(to_numpy(gram.cross(array([[1e30]], "float32"), array([[1e30]], "float32")))).all()
