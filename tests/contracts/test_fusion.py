"""Every fusion method keeps the promises it declares. A new method is found by the registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loratools.core.update import Delta
from loratools.errors import LoratoolsError
from loratools.fusion.base import FUSIONS, Method
from loratools.fusion.combine import Zero
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank
from loratools.linalg.namespace import to_numpy

Library = Callable[[Any], Any]
ALL = list(FUSIONS)
M, N = 23, 17
EPS = np.finfo(np.float64).eps
# What float64 leaves after canonical forms, polar factors and eigenproblems of matrices of this size and condition
# (< 1e3): some hundred roundings, each of at most dim * eps, amplified by the condition.
CLOSE = 1e3 * 100 * max(M, N) * EPS  # 4e-9


def low_rank(rank: int, seed: int, scale: float = 1.0) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(rng.standard_normal((M, rank)) / 5, rng.standard_normal((rank, N)) / 4, scale)


def regauged(u: LowRank, seed: int = 99) -> LowRank:
    g = np.random.default_rng(seed).standard_normal((u.rank, u.rank)) + 2 * np.eye(u.rank)
    return replace(u, b=u.b @ g * u.scale, a=np.linalg.solve(g, u.a), scale=1.0)


def inputs(method: Method, *, mixed: bool = True) -> list[LowRank]:
    """As many adapters as the method takes, up to three; of equal rank where factors are merged apart."""
    ranks = [3, 3, 3] if not mixed or "equal ranks" in method.guarantee else [3, 1, 4]
    return [low_rank(r, seed, scale) for r, seed, scale in zip(ranks, (1, 2, 3), (1.0, 2.0, -0.5), strict=True)][
        : method.most
    ]


def fused(
    method: Method, deltas: Sequence[Delta], weights: Sequence[float], *, seed: int = 0, **settings: Any
) -> np.ndarray:
    handed = {"seed": seed, "statistics": [np.linspace(1, 2, N) + i for i in range(len(deltas))]}
    given = {name: handed[name] for name in method.handed_over}
    return np.asarray(to_numpy(method.run(deltas, weights, **method.settings(settings), **given).dense()))


def oracle(deltas: Sequence[Delta], weights: Sequence[float]) -> np.ndarray:
    return sum(w * np.asarray(d.dense(), np.float64) for w, d in zip(weights, deltas, strict=True))  # type: ignore[return-value]


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = CLOSE) -> None:
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * max(np.linalg.norm(expected), 1e-300)


@pytest.mark.parametrize("name", ALL)
def test_one_adapter_at_weight_one_is_itself(name: str) -> None:
    method = FUSIONS[name]
    if method.identity is None:
        pytest.skip("declared: one adapter does not give itself")
    for u in inputs(method):
        assert_close(fused(method, [u], [1.0], **method.identity), oracle([u], [1.0]))


@pytest.mark.parametrize("name", [name for name in ALL if FUSIONS[name].identity is None])
def test_declared_exceptions_are_exceptions(name: str) -> None:
    u = low_rank(3, 1)
    assert np.linalg.norm(fused(FUSIONS[name], [u], [1.0]) - oracle([u], [1.0])) > 0.01


@pytest.mark.parametrize("name", ALL)
def test_the_gauge_of_the_factors_does_not_matter(name: str) -> None:
    method = FUSIONS[name]
    deltas = inputs(method)
    weights = [0.7, 0.5, 0.3][: len(deltas)]
    before = fused(method, deltas, weights)
    after = fused(method, [regauged(u, i) for i, u in enumerate(deltas)], weights)
    if method.gauge_free:
        assert_close(after, before)
    else:
        assert np.linalg.norm(after - before) > 0.01 * np.linalg.norm(before)


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_the_adapters_does_not_matter(name: str) -> None:
    method = FUSIONS[name]
    deltas = inputs(method)
    weights = [0.7, 0.5, 0.3][: len(deltas)]
    order = list(range(len(deltas)))[::-1]
    before = fused_with_statistics(method, deltas, weights, list(range(len(deltas))))
    after = fused_with_statistics(method, [deltas[i] for i in order], [weights[i] for i in order], order)
    if not method.ordered:
        assert_close(after, before)
    else:
        assert np.linalg.norm(after - before) > 0.01 * np.linalg.norm(before)


def fused_with_statistics(
    method: Method, deltas: Sequence[Delta], weights: Sequence[float], places: list[int]
) -> np.ndarray:
    """Statistics belong to an adapter, wherever it stands."""
    given: dict[str, Any] = {"seed": 0, "statistics": [np.linspace(1, 2, N) ** (1 + i) for i in places]}
    handed = {name: given[name] for name in method.handed_over}
    return np.asarray(method.run(deltas, weights, **method.settings({}), **handed).dense())


@pytest.mark.parametrize("name", ALL)
def test_two_identical_adapters_do_not_blow_up(name: str) -> None:
    method = FUSIONS[name]
    u = low_rank(3, 1)
    twin = regauged(u) if method.gauge_free else u
    out = fused(method, [u, twin], [0.5, 0.5])
    # Weights that sum to 1 may shrink (trimming, whitening) or stretch: random masks by at most 1 / (density - epsilon)
    # < 3; PEFT's cross terms by 2, and its masks on both factors by 1 / density each.
    assert np.all(np.isfinite(out))
    assert np.linalg.norm(out) <= (8 if "PEFT" in method.reference else 3) * np.linalg.norm(u.dense())
    assert np.linalg.norm(out) >= 0.1 * np.linalg.norm(u.dense()) or "dare" in name


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_gives_the_same_result_and_inputs_stay(name: str) -> None:
    method = FUSIONS[name]
    deltas = inputs(method)
    copies = [(u.b.copy(), u.a.copy()) for u in deltas]
    weights = [0.7, 0.5, 0.3][: len(deltas)]
    assert np.array_equal(fused(method, deltas, weights, seed=5), fused(method, deltas, weights, seed=5))
    assert all(np.array_equal(u.b, b) and np.array_equal(u.a, a) for u, (b, a) in zip(deltas, copies, strict=True))
    if "seed" in method.handed_over and "rule" not in method.parameters:
        assert not np.array_equal(fused(method, deltas, weights, seed=5), fused(method, deltas, weights, seed=6))


@pytest.mark.parametrize("name", [name for name in ALL if FUSIONS[name].linear_limit is not None])
def test_the_linear_limit_is_the_weighted_sum(name: str) -> None:
    method = FUSIONS[name]
    deltas, weights = inputs(method), [0.7, -0.5, 0.3]
    assert_close(fused(method, deltas, weights, **(method.linear_limit or {})), oracle(deltas, weights))


@pytest.mark.parametrize("name", ALL)
def test_a_missing_module_is_zero(name: str) -> None:
    """The known zero and the written one (b = 0) are the same, and nothing divides by their norm."""
    method = FUSIONS[name]
    u, empty = low_rank(3, 1), LowRank(np.zeros((M, 3)), np.ones((3, N)))
    known = fused(method, [u, Zero((M, N), u.b)], [0.5, 0.5])
    assert np.all(np.isfinite(known))
    if "PEFT" not in method.reference:  # PEFT skips the adapter: the other one is merged alone
        assert_close(fused(method, [u, empty], [0.5, 0.5]), known)
    assert not np.any(fused(method, [Zero((M, N), u.b), Zero((M, N), u.b)][: method.most], [1.0, 1.0][: method.most]))


@pytest.mark.parametrize("name", ALL)
def test_shapes_of_a_convolution_are_kept(name: str) -> None:
    method = FUSIONS[name]
    deltas = [LowRank(u.b, np.tile(u.a, (1, 4)), u.scale, (M, N, 2, 2)) for u in inputs(method, mixed=False)[:2]]
    handed = {"seed": 0, "statistics": [np.ones(4 * N)] * 2}
    given = {key: handed[key] for key in method.handed_over}
    assert method.run(deltas, [0.5, 0.5], **method.settings({}), **given).shape == (M, N, 2, 2)


@pytest.mark.parametrize("name", ALL)
def test_an_update_without_factors_is_fused_or_refused(name: str) -> None:
    """A dense difference (or a DoRA's true update) gives what the same update as factors gives."""
    method = FUSIONS[name]
    deltas = inputs(method)
    weights = [0.7, 0.5, 0.3][: len(deltas)]
    dense: list[Delta] = [Dense(deltas[0].dense()), *deltas[1:]]
    try:
        found = fused(method, dense, weights)
    except LoratoolsError:
        assert "PEFT" in method.reference
        return
    assert_close(found, fused(method, deltas, weights))


@pytest.mark.parametrize("name", ALL)
def test_both_array_libraries_agree(name: str, library: Library) -> None:
    method = FUSIONS[name]
    deltas = inputs(method)
    weights = [0.7, 0.5, 0.3][: len(deltas)]
    moved = [replace(u, b=library(u.b), a=library(u.a)) for u in deltas]
    statistics = [library(np.linspace(1, 2, N) + i) for i in range(len(deltas))]
    handed = {"seed": 0, "statistics": statistics}
    given = {key: handed[key] for key in method.handed_over}
    out = method.run(moved, weights, **method.settings({}), **given)
    assert_close(to_numpy(out.dense()), fused(method, deltas, weights))


@pytest.mark.parametrize("name", ALL)
def test_methods_are_documented(name: str) -> None:
    method = FUSIONS[name]
    assert method.summary.endswith((".", ":"))
    assert method.reference
    assert method.guarantee
