"""Rotations and reflections against their definitions, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loratools.linalg.cayley import cayley, neumann, projected, reflections, skew
from loratools.linalg.namespace import to_numpy

rng = np.random.default_rng(0)
ATOL = 1e-13  # a few hundred roundings of entries of size 1


def test_skew_fills_the_upper_triangle_row_by_row(library: Callable[[Any], Any]) -> None:
    q = to_numpy(skew(library(np.arange(1.0, 7.0)[None]), 4))[0]
    assert np.array_equal(q[np.triu_indices(4, 1)], np.arange(1.0, 7.0))
    assert np.array_equal(q, -q.T)


def test_cayley_is_orthogonal_and_its_definition(library: Callable[[Any], Any]) -> None:
    q = to_numpy(skew(library(rng.standard_normal((3, 10))), 5))
    r = to_numpy(cayley(library(q))) + np.eye(5)
    for turn, one in zip(r, q, strict=True):
        assert np.allclose(turn, (np.eye(5) - one) @ np.linalg.inv(np.eye(5) + one), rtol=0, atol=ATOL)
        assert np.allclose(turn @ turn.T, np.eye(5), rtol=0, atol=ATOL)


@pytest.mark.parametrize("terms", range(1, 8))
def test_neumann_is_the_series_that_turns_the_other_way(terms: int, library: Callable[[Any], Any]) -> None:
    q = to_numpy(skew(library(0.1 * rng.standard_normal((1, 6))), 4))
    powers = [np.linalg.matrix_power(q[0], i) for i in range(8)]
    old = to_numpy(neumann(library(q), terms, halved=False))[0]
    assert np.allclose(old, sum((2 * powers[i] for i in range(1, terms)), np.zeros((4, 4))), rtol=0, atol=ATOL)
    new = to_numpy(neumann(library(q), terms))[0]
    literal = {1: [], 2: [2], 3: [2, 2, 1], 4: [2, 2, 1], 5: [2, 2, 2, 1], 6: [2, 2, 2, 2, 1], 7: [2, 2, 2, 2, 2, 1]}
    assert np.allclose(new, sum((c * p for c, p in zip(literal[terms], powers[1:], strict=False)), np.zeros((4, 4))),
                       rtol=0, atol=ATOL)  # fmt: skip
    back = to_numpy(cayley(library(-q)))[0]
    assert np.abs(neumann(q, 40)[0] - back).max() < ATOL


def test_projection_pulls_back_only_what_is_too_far(library: Callable[[Any], Any]) -> None:
    q = to_numpy(skew(library(np.array([[3.0], [1e-3], [0.0]])), 2))
    found = to_numpy(projected(library(q), 0.01))
    assert np.allclose(np.linalg.norm(found, axis=(1, 2)), [0.01 / 3**0.5, 2**0.5 * 1e-3, 0.0])
    assert np.array_equal(found[1], q[1])


@pytest.mark.parametrize("r", [1, 2, 5])
def test_reflections_in_a_row_are_one_product(r: int, library: Callable[[Any], Any]) -> None:
    u = rng.standard_normal((6, r))
    b, a = (to_numpy(t) for t in reflections(library(u)))
    product = np.eye(6)
    for column in u.T:
        v = (column / np.linalg.norm(column))[:, None]
        product = product @ (np.eye(6) - 2 * v @ v.T)
    assert np.allclose(b @ a, product - np.eye(6), rtol=0, atol=ATOL)
