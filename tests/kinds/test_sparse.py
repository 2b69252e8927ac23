"""Sparse updates: the index is checked, entries are added bit for bit where they stand and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.errors import FormatError, NumericsError
from loratools.kinds.lowrank import LowRank
from loratools.kinds.sparse import Sparse, coalesced, of_entries, united


def made(shape: tuple[int, ...] = (6, 9), count: int = 17, seed: int = 0) -> tuple[Sparse, np.ndarray]:
    rng = np.random.default_rng(seed)
    flat = np.sort(rng.permutation(int(np.prod(shape)))[:count]).astype(np.int64)
    values = rng.standard_normal(count).astype(np.float32)
    dense = np.zeros(int(np.prod(shape)), np.float32)
    dense[flat] = values
    return of_entries(flat, values, shape), dense.reshape(shape)


@pytest.mark.parametrize("shape", [(6, 9), (1, 40), (40, 1), (3, 2, 2, 2)])
def test_entries_stand_where_they_were_put(shape: tuple[int, ...]) -> None:
    u, dense = made(shape)
    assert np.array_equal(u.dense(), dense)
    assert u.nnz == 17
    assert u.columns.dtype == np.uint16


def test_wide_parameters_number_their_columns_in_32_bits() -> None:
    flat = np.array([0, 65535, 65536, 70000 + 3], np.int64)
    u = of_entries(flat, np.ones(4, np.float32), (2, 70000))
    assert u.columns.dtype == np.uint32
    assert np.array_equal(u.flat(), flat)


def test_other_entries_keep_their_bits() -> None:
    u, dense = made()
    w = np.full(dense.shape, -0.0, np.float16)
    out = u.apply(w)
    assert np.array_equal(np.signbit(out[dense == 0]), np.signbit(w[dense == 0]))
    assert np.array_equal(out[dense != 0], dense[dense != 0].astype(np.float16))
    assert np.all(np.signbit(w))


def test_no_entries_at_all() -> None:
    u = of_entries(np.zeros(0, np.int64), np.zeros(0, np.float32), (4, 5))
    assert not u.dense().any()
    assert u.matmul(np.ones((5, 2), np.float32)).shape == (4, 2)


def test_entries_in_any_order_are_sorted_and_repeated_ones_added() -> None:
    row, column = np.array([2, 0, 2, 1]), np.array([3, 1, 3, 0])
    u = coalesced(row, column, np.array([1.0, 2.0, 4.0, 8.0], np.float32), (3, 4))
    assert u.nnz == 3
    assert np.array_equal(u.dense(), [[0, 2, 0, 0], [8, 0, 0, 0], [0, 0, 0, 5]])


@pytest.mark.parametrize(("row", "column"), [([0, 3], [0, 0]), ([0, 0], [0, 9]), ([-1, 0], [0, 0])])
def test_places_outside_are_refused(row: list[int], column: list[int]) -> None:
    with pytest.raises(FormatError, match="out of range"):
        coalesced(np.array(row), np.array(column), np.ones(2, np.float32), (3, 4))


@pytest.mark.parametrize(
    ("rows", "columns"), [([0, 1, 1], [0, 1]), ([1, 1, 2], [0, 1]), ([0, 2, 2], [1, 1]), ([0, 2, 2], [0, 7])]
)
def test_broken_indices_are_refused_when_used(rows: list[int], columns: list[int]) -> None:
    u = Sparse(np.array(rows), np.array(columns), np.ones(2, np.float32), (2, 5))
    with pytest.raises(FormatError):
        u.dense()


def test_sizes_must_agree() -> None:
    with pytest.raises(FormatError, match="disagree"):
        Sparse(np.array([0, 1]), np.array([0, 1]), np.ones(1, np.float32), (1, 5))


def test_nan_is_refused() -> None:
    with pytest.raises(NumericsError):
        of_entries(np.array([0]), np.array([np.nan], np.float32), (1, 5))


def test_inner_product_with_factors_and_with_entries() -> None:
    from loratools.core import generic

    u, dense = made((5, 7), 12)
    v, other = made((5, 7), 15, seed=1)
    low = LowRank.example(0)
    assert generic.inner(u, v) == pytest.approx(float((dense * other).sum()), rel=1e-6)
    assert generic.inner(u, low) == pytest.approx(float((dense * low.dense()).sum()), rel=1e-6)


def test_the_union_of_supports() -> None:
    u, dense = made()
    v, other = made(seed=1)
    union, (first, second) = united([u, v])
    assert np.array_equal(union, np.flatnonzero((dense != 0) | (other != 0)))
    assert np.array_equal(union[first], u.flat())
    assert np.array_equal(union[second], v.flat())
