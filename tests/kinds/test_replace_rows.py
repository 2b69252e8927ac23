from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.core.rows import rowwise
from loratools.errors import FormatError, MismatchError
from loratools.kinds.lowrank import LowRank, low_rank, low_ranks, with_low_ranks
from loratools.kinds.rebased import Rebased
from loratools.kinds.replace_rows import ReplaceRows, RowsDelta

Rows = st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True)


def values(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(Rows)
@settings(max_examples=30, deadline=None)
def test_the_named_rows_and_no_others_change(index: list[int]) -> None:
    w, rows = values(10, 3), values(len(index), 3, seed=1)
    u = ReplaceRows(rows, tuple(index), (10, 3))
    expected = w.copy()
    expected[index] = rows
    assert np.array_equal(u.apply(w), expected)
    assert np.array_equal(u.delta(w).dense(), expected - w)
    parts = rowwise(u)
    assert parts is not None
    for start, stop in ((0, 4), (4, 9), (9, 10)):
        assert np.array_equal(parts(start, stop).apply(w[start:stop]), expected[start:stop])


def test_products_of_the_difference() -> None:
    d = RowsDelta.example(0)
    x, y = values(7, 2), values(6, 2, seed=1)
    assert np.abs(d.matmul(x) - d.dense() @ x).max() <= 1e-6
    assert np.abs(d.rmatmul(y) - d.dense().T @ y).max() <= 1e-6


def test_rows_take_the_dtype_of_the_base() -> None:
    w = values(4, 3).astype(ml_dtypes.bfloat16)
    rows = values(2, 3, seed=1)
    got = ReplaceRows(rows, (3, 0), (4, 3)).apply(w)
    assert got.dtype == w.dtype
    assert np.array_equal(got[[3, 0]], rows.astype(ml_dtypes.bfloat16))


def test_without_a_base_the_largest_index_tells_the_least_size() -> None:
    u = ReplaceRows(values(2, 3), (6, 1))
    assert u.shape == (7, 3)
    with pytest.raises(MismatchError):
        u.apply(values(6, 3))
    with pytest.raises(MismatchError):
        u.apply(None)


@pytest.mark.parametrize("index", [(1, 1), (-1, 2), (0, 4), (1,)])
def test_an_index_that_does_not_fit_is_refused(index: tuple[int, ...]) -> None:
    with pytest.raises(FormatError):
        ReplaceRows(values(2, 3), index, (4, 3))


def test_an_update_of_a_base_of_its_own() -> None:
    value, w = values(5, 7, seed=2), values(5, 7)
    inner = LowRank.example(0)
    u = Rebased(value, inner)
    assert np.array_equal(u.apply(w), inner.apply(value))
    assert np.array_equal(u.apply(None), inner.apply(value))
    assert np.abs(u.delta(w).dense() - (inner.apply(value) - w)).max() <= 1e-6
    assert low_rank(u) is inner
    again = with_low_ranks(u, low_ranks(u) or ())
    assert isinstance(again, Rebased)
    assert again.update is inner
    assert again.value is value
    with pytest.raises(MismatchError):
        u.delta(values(4, 7))
    with pytest.raises(FormatError):
        Rebased(values(4, 7), inner)
