"""The k largest by histogram: the same entries as a stable sort of everything, in both libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loratools.errors import NumericsError, UsageError
from loratools.linalg.namespace import to_numpy
from loratools.linalg.selection import bins, boundary, first_largest, histogram


def sorted_prefix(x: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.argsort(-x, kind="stable")[:k])


@pytest.mark.parametrize("k", [1, 2, 17, 499, 500])
@pytest.mark.parametrize("ties", [False, True])
def test_boundary_and_remainder_are_the_sorted_prefix(k: int, ties: bool, library: Callable[[Any], Any]) -> None:
    x = np.abs(np.random.default_rng(k).standard_normal(500)).astype(np.float32)
    x = np.round(x, 1) if ties else x
    scores = library(x)
    places = bins(scores)
    edge, above = boundary(histogram(places), k)
    near = np.flatnonzero(to_numpy(places) == edge)
    chosen = near[to_numpy(first_largest(scores[library(near)], k - above))]
    assert np.array_equal(
        np.sort(np.concatenate([np.flatnonzero(to_numpy(places) > edge), chosen])), sorted_prefix(x, k)
    )


def test_out_of_range() -> None:
    counts = histogram(bins(np.ones(5, np.float32)))
    for k in (0, 6):
        with pytest.raises(UsageError):
            boundary(counts, k)


def test_not_finite() -> None:
    with pytest.raises(NumericsError):
        bins(np.array([1.0, np.nan], np.float32))
