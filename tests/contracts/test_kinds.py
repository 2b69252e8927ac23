"""Every kind of update keeps the same promises, on both array libraries. A new kind is found by the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from loratools.core import generic
from loratools.core.routes import graph
from loratools.core.update import KINDS, Delta, Update, is_tensor, nbytes, tensors
from loratools.errors import LoratoolsError, UsageError
from loratools.kinds.lowrank import low_rank, with_low_rank
from loratools.linalg.namespace import to_numpy, up

Library = Callable[[Any], Any]
ALL = list(KINDS)
DELTAS = [name for name in ALL if issubclass(KINDS[name], Delta)]
SEED = 7
EPS = np.finfo(np.float32).eps


def moved(value: Any, library: Library) -> Any:
    """Rebuild a kind with its tensors in the given library."""
    if isinstance(value, Update):
        return replace(value, **{f.name: moved(getattr(value, f.name), library) for f in fields(value)})  # type: ignore[type-var]
    if isinstance(value, tuple) and value and isinstance(value[0], Update):
        return tuple(moved(part, library) for part in value)
    return library(to_numpy(value)) if is_tensor(value) else value


def example(name: str, library: Library) -> Any:
    return moved(KINDS[name].example(SEED), library)


def base_for(u: Update, library: Library) -> Any:
    return library(np.random.default_rng(3).standard_normal(u.shape).astype(np.float32))


def dense64(u: Delta) -> np.ndarray[Any, Any]:
    return to_numpy(u.matrix()).astype(np.float64)


@pytest.mark.parametrize("name", ALL)
def test_apply_leaves_the_base_alone_and_keeps_its_dtype(name: str, library: Library) -> None:
    u = example(name, library)
    w = base_for(u, library)
    before = to_numpy(w).copy()
    out = u.apply(w)
    assert tuple(out.shape) == u.shape
    assert out.dtype == w.dtype
    assert np.array_equal(to_numpy(w), before)


@pytest.mark.parametrize("name", ALL)
def test_delta_is_what_apply_adds(name: str, library: Library) -> None:
    u = example(name, library)
    w = base_for(u, library)
    added = to_numpy(u.apply(w)).astype(np.float64) - to_numpy(w)
    told = to_numpy(u.delta(w).dense())
    # one rounding of W' (|W'| <= 10 here) and a few of the arithmetic
    assert np.abs(added - told).max() <= 64 * EPS * max(np.abs(to_numpy(w)).max(), 1.0)


@pytest.mark.parametrize("name", DELTAS)
def test_products_are_those_of_the_dense_matrix(name: str, library: Library) -> None:
    u = example(name, library)
    rng = np.random.default_rng(1)
    m, n = u.matrix_shape
    x, y = rng.standard_normal((n, 3)).astype(np.float32), rng.standard_normal((m, 2)).astype(np.float32)
    d = dense64(u)
    scale = np.abs(d).max() * max(m, n)  # rounding grows with the length of the sums
    assert np.abs(to_numpy(u.matmul(library(x))) - d @ x).max() <= 16 * EPS * scale * np.abs(x).max()
    assert np.abs(to_numpy(u.rmatmul(library(y))) - d.T @ y).max() <= 16 * EPS * scale * np.abs(y).max()


@pytest.mark.parametrize("name", DELTAS)
def test_products_are_adjoint(name: str, library: Library) -> None:
    u = example(name, library)
    rng = np.random.default_rng(2)
    m, n = u.matrix_shape
    x, y = rng.standard_normal((n, 1)).astype(np.float32), rng.standard_normal((m, 1)).astype(np.float32)
    left = float((y * to_numpy(u.matmul(library(x)))).sum())
    right = float((x * to_numpy(u.rmatmul(library(y)))).sum())
    norms = np.linalg.norm(dense64(u)) * np.linalg.norm(x) * np.linalg.norm(y)
    assert abs(left - right) <= 16 * EPS * max(m, n) * norms


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_svd_is_optimal_orthonormal_descending_and_exactly_k(name: str, library: Library, k: int) -> None:
    u = example(name, library)
    k = min(k, *u.matrix_shape)
    d = dense64(u)
    left, s, right = (to_numpy(t).astype(np.float64) for t in generic.svd(u, k, seed=0))
    assert (left.shape, s.shape, right.shape) == ((d.shape[0], k), (k,), (k, d.shape[1]))
    assert np.all(s >= 0)
    assert np.all(np.diff(s) <= EPS * s[0])
    # fp32 orthonormality: about sqrt(dim) rounding errors per entry
    assert np.abs(left.T @ left - np.eye(k)).max() <= 1e-5
    assert np.abs(right @ right.T - np.eye(k)).max() <= 1e-5
    true = np.linalg.svd(d, compute_uv=False)
    best = np.sqrt((true[k:] ** 2).sum())
    # a randomized rule may exceed the optimum by 0.5% of the tail; everything else is rounding
    assert np.linalg.norm(d - left * s @ right) <= 1.005 * best + 1e-5 * np.linalg.norm(d)


@pytest.mark.parametrize("name", DELTAS)
def test_svd_refuses_impossible_ranks(name: str) -> None:
    u = KINDS[name].example(SEED)
    for k in (0, -1, max(u.matrix_shape) + 1):  # type: ignore[attr-defined]
        with pytest.raises(UsageError):
            generic.svd(u, k, seed=0)


@pytest.mark.parametrize("name", DELTAS)
def test_singular_values_and_norm(name: str, library: Library) -> None:
    u = example(name, library)
    true = np.linalg.svd(dense64(u), compute_uv=False)
    told = to_numpy(generic.svdvals(u))
    assert np.allclose(told, true[: len(told)], atol=1e-5 * true[0])  # fp32 Gram: sqrt(eps) on the smallest
    assert abs(generic.norm(u) - np.linalg.norm(true)) <= 1e-6 * np.linalg.norm(true)


@pytest.mark.parametrize("first", DELTAS)
@pytest.mark.parametrize("second", DELTAS)
def test_inner_products_of_every_pair(first: str, second: str, library: Library) -> None:
    u, v = example(first, library), moved(KINDS[second].example(SEED + 1), library)
    if u.matrix_shape != v.matrix_shape:
        with pytest.raises(LoratoolsError):
            generic.inner(u, v)
        return
    true = float((dense64(u) * dense64(v)).sum())
    assert abs(generic.inner(u, v) - true) <= 1e-6 * np.linalg.norm(dense64(u)) * np.linalg.norm(dense64(v))


@pytest.mark.parametrize(
    "edge", [(a.kind, b.kind) for a, b, d in graph().edges(data=True) if d["route"].exact], ids="-".join
)
def test_exact_routes_are_exact(edge: tuple[str, str], library: Library) -> None:
    source, target = edge
    u = example(source, library)
    v = generic.convert(u, (KINDS[target],))
    assert v.kind == target
    assert isinstance(v, Delta)
    exact, got = to_numpy(u.dense()).astype(np.float64), to_numpy(v.dense())
    assert np.abs(got - exact).max() <= 16 * EPS * np.abs(exact).max()


@pytest.mark.parametrize("name", ALL)
def test_tensors_and_bytes_count_every_field(name: str) -> None:
    u = KINDS[name].example(SEED)
    found = dict(tensors(u))
    assert found
    assert nbytes(u) == sum(up(t).nbytes if t.dtype == np.float32 else t.nbytes for t in found.values())


@pytest.mark.parametrize("name", ALL)
def test_the_direction_can_be_put_back(name: str) -> None:
    u = KINDS[name].example(SEED)
    direction = low_rank(u)
    if direction is None:
        return
    back = with_low_rank(u, direction)
    w = base_for(u, np.asarray)
    assert np.allclose(back.apply(w), u.apply(w), atol=64 * EPS * np.abs(w).max())
