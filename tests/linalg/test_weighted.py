"""Weighted truncation against the dense weighted SVD in fp64, the plain squeeze, and cases with known answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import NumericsError, UsageError
from loratools.linalg import factored, weighted
from loratools.linalg.namespace import dtype_name, to_numpy
from loratools.linalg.weighted import Weights

FORMS = ["none", "diagonal", "zeros", "gram", "singular"]
EXACT = 1e-10  # the promise: every term of the comparison is fp64, so that eps times sizes below 1e3 is far inside


def fixed(k: int) -> Callable:
    return lambda s: k


def weight(rng: np.random.Generator, n: int, form: str) -> np.ndarray | None:
    """A weight as it is passed: diagonals over two decades, Gram matrices of enough or of too few samples."""
    if form == "none":
        return None
    if form in ("diagonal", "zeros"):
        d = rng.uniform(0.1, 10, n)
        return d if form == "diagonal" else np.where(np.arange(n) % 3 == 0, 0.0, d)
    x = rng.standard_normal((2 * n if form == "gram" else n // 3, n)) * np.logspace(0, -1, n)
    return x.T @ x / len(x)


def root(w: np.ndarray | None, n: int) -> np.ndarray:
    """The symmetric square root, dense."""
    if w is None:
        return np.eye(n)
    if w.ndim == 1:
        return np.diag(np.sqrt(w))
    mu, x = np.linalg.eigh(w)
    return (x * np.sqrt(np.clip(mu, 0, None))) @ x.T


def case(seed: int, left: str, right: str, m: int = 24, n: int = 18, r: int = 9):
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((m, r)) * np.logspace(0, -1, r), rng.standard_normal((r, n))
    return b, a, weight(rng, m, left), weight(rng, n, right)


@pytest.mark.parametrize("left", FORMS)
@pytest.mark.parametrize("right", FORMS)
@pytest.mark.parametrize("k", [1, 4, 9])
def test_equals_the_dense_weighted_svd(array, left, right, k):
    b, a, p, q = case(0, left, right)
    result = weighted.truncate(
        array(b), array(a), fixed(k), weights=Weights(*(None if w is None else array(w) for w in (p, q))), scale=-1.5
    )
    d, p2, q2 = -1.5 * b @ a, root(p, len(b)), root(q, a.shape[1])
    s = np.linalg.svd(p2 @ d @ q2, compute_uv=False)
    size, best = np.linalg.norm(s), np.linalg.norm(s[k:])
    cut = to_numpy(result.b) @ to_numpy(result.a)
    error = np.linalg.norm(p2 @ (d - cut) @ q2)
    assert abs(error - best) <= EXACT * size
    assert result.rank == k
    assert result.b.shape == (24, k)
    assert abs(result.error * size - best) <= 1e-7 * size  # the root of a difference of squares where it is zero
    plain = factored.truncate(array(b), array(a), fixed(k), scale=-1.5)
    assert error <= np.linalg.norm(p2 @ (d - to_numpy(plain.b) @ to_numpy(plain.a)) @ q2) + EXACT * size


def test_invertible_weights_have_one_optimum(array):
    """P^-1/2 (best of P^1/2 D Q^1/2) Q^-1/2, inverses formed by the dense judge alone."""
    b, a, p, q = case(1, "diagonal", "gram")
    result = weighted.truncate(array(b), array(a), fixed(4), weights=Weights(array(p), array(q)))
    p2, q2 = root(p, 24), root(q, 18)
    u, s, vh = np.linalg.svd(p2 @ (b @ a) @ q2, full_matrices=False)
    best = np.linalg.inv(p2) @ (u[:, :4] * s[:4]) @ vh[:4] @ np.linalg.inv(q2)
    # the noise of Gram matrices turns a direction by at most 1e-9 over its relative gap (here 0.05 and more)
    assert np.abs(to_numpy(result.b) @ to_numpy(result.a) - best).max() <= 1e-7 * np.abs(best).max()


@pytest.mark.parametrize("identity", [None, "vector", "matrix"])
def test_without_weights_it_is_the_plain_squeeze(array, identity):
    b, a, _, _ = case(2, "none", "none")
    ones = {None: lambda n: None, "vector": lambda n: array(np.ones(n)), "matrix": lambda n: array(np.eye(n))}[identity]
    result = weighted.truncate(array(b), array(a), fixed(4), weights=Weights(ones(24), ones(18)), scale=2.0)
    plain = factored.truncate(array(b), array(a), fixed(4), scale=2.0)
    got, want = (to_numpy(t.b) @ to_numpy(t.a) for t in (result, plain))
    assert np.abs(got - want).max() <= 1e-9 * np.abs(want).max()
    assert result.error == pytest.approx(plain.error, rel=1e-9)
    left, right = to_numpy(result.b), to_numpy(result.a)
    assert np.allclose(left.T @ left, np.diag(to_numpy(result.singular_values)[:4]), atol=1e-9)  # balanced
    assert np.allclose(right @ right.T, left.T @ left, atol=1e-9)


def test_scaled_weights_change_nothing(array):
    b, a, p, q = case(3, "diagonal", "gram")
    one, other = (
        weighted.truncate(array(b), array(a), fixed(3), weights=Weights(array(c * p), array(q / c))) for c in (1.0, 1e6)
    )
    assert np.allclose(to_numpy(one.b) @ to_numpy(one.a), to_numpy(other.b) @ to_numpy(other.a), atol=1e-9)


def test_gauge_free(array):
    b, a, p, q = case(4, "zeros", "singular")
    g = np.random.default_rng(5).standard_normal((9, 9))
    weights = Weights(array(p), array(q))
    one = weighted.truncate(array(b), array(a), fixed(3), weights=weights)
    other = weighted.truncate(array(b @ g), array(np.linalg.solve(g, a)), fixed(3), weights=weights)
    assert np.allclose(to_numpy(one.b) @ to_numpy(one.a), to_numpy(other.b) @ to_numpy(other.a), atol=1e-7)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_no_weight_sees_keeps_the_remaining_ranks(array, side):
    """One observed direction: rank 1 is exact where it matters, the others serve the plain error."""
    b, a, _, _ = case(6, "none", "none")
    lone = np.zeros(24 if side == "left" else 18)
    lone[2] = 1.0
    result = weighted.truncate(array(b), array(a), fixed(9), weights=Weights(**{side: array(lone)}))
    assert np.allclose(to_numpy(result.b) @ to_numpy(result.a), b @ a, atol=1e-12)  # nothing is cut
    four = weighted.truncate(array(b), array(a), fixed(4), weights=Weights(**{side: array(lone)}))
    left = b @ a - to_numpy(four.b) @ to_numpy(four.a)
    assert np.linalg.norm(left[2] if side == "left" else left[:, 2]) <= 1e-12
    assert np.linalg.norm(left) < np.linalg.norm(b @ a)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_every_shape(m, n, r, k, seed):
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((m, r)), rng.standard_normal((r, n))
    p, q = rng.uniform(0, 1, m) + 1e-3, np.cov(rng.standard_normal((n, n + 2))).reshape(n, n)
    result = weighted.truncate(b, a, fixed(k), weights=Weights(p, q))
    p2, q2 = root(p, m), root(q, n)
    s = np.linalg.svd(p2 @ b @ a @ q2, compute_uv=False)
    error = np.linalg.norm(p2 @ (b @ a - result.b @ result.a) @ q2)
    assert error <= np.linalg.norm(s[k:]) + EXACT * np.linalg.norm(s)
    assert result.b.shape[1] == min(k, m, n, r)


def test_prefixes_are_the_optima_of_their_ranks(array):
    b, a, p, q = case(7, "diagonal", "gram")
    result = weighted.truncate(array(b), array(a), fixed(6), weights=Weights(array(p), array(q)))
    p2, q2, tall, wide = root(p, 24), root(q, 18), to_numpy(result.b), to_numpy(result.a)
    s = np.linalg.svd(p2 @ b @ a @ q2, compute_uv=False)
    for j in range(1, 7):
        error = np.linalg.norm(p2 @ (b @ a - tall[:, :j] @ wide[:j]) @ q2)
        assert abs(error - np.linalg.norm(s[j:])) <= EXACT * np.linalg.norm(s)


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e7])
def test_outliers_among_the_inputs(condition):
    """A few input channels are thousands of times larger than the rest, as in language models."""
    rng = np.random.default_rng(8)
    b, a = rng.standard_normal((64, 8)), rng.standard_normal((8, 96))
    x = rng.standard_normal((400, 96))
    x[:, :2] *= condition**0.5
    c = x.T @ x / 400
    result = weighted.truncate(b, a, fixed(3), weights=Weights(None, c))
    q2 = root(c, 96)
    s = np.linalg.svd(b @ a @ q2, compute_uv=False)
    assert np.linalg.norm((b @ a - result.b @ result.a) @ q2) <= np.linalg.norm(s[3:]) + EXACT * np.linalg.norm(s)


def test_zero_update_and_storage_dtype(array):
    weights = Weights(array(np.ones(5)), array(np.ones(6)))
    result = weighted.truncate(
        array(np.zeros((5, 3)), "float16"), array(np.ones((3, 6)), "float16"), fixed(2), weights=weights
    )
    assert (result.energy, result.error, dtype_name(result.b)) == (1.0, 0.0, "float32")
    assert not to_numpy(result.b).any()
    assert (np.linalg.norm(to_numpy(result.a), axis=1) > 0.5).all()  # rows that can be trained


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("weight", "error", "match"),
    [
        (np.ones(3), UsageError, "wrong shape"),
        (np.ones((4, 5)), UsageError, "wrong shape"),
        (np.array([1.0, 2, -1, 1]), NumericsError, "negative or not finite"),
        (np.array([1.0, 2, np.nan, 1]), NumericsError, "negative or not finite"),
        (np.full((4, 4), np.inf), NumericsError, "negative or not finite"),
        (np.zeros(4), NumericsError, "all zero"),
        (np.array([[1.0, 2, 0, 0], [2, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), NumericsError, "semidefinite"),
    ],
)
def test_what_is_no_weight_is_refused(array, side, weight, error, match):
    b, a = array(np.eye(4)), array(np.eye(4))
    given = [None, None]
    given[side] = array(weight)
    with pytest.raises(error, match=match):
        weighted.truncate(b, a, fixed(1), weights=Weights(*given))


def test_norms(array):
    b, a, p, q = case(9, "diagonal", "gram")
    want = np.linalg.norm(root(p, 24) @ (2 * b @ a) @ root(q, 18))
    assert weighted.norm(array(b), array(a), Weights(array(p), array(q)), scale=-2.0) == pytest.approx(want, rel=1e-12)
    want = np.linalg.norm(root(p, 24) @ (b @ a))
    assert weighted.norm(array(b), array(a), Weights(array(p), None)) == pytest.approx(want, rel=1e-7)  # fp32 rule
