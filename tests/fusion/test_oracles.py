"""Every method against a dense float64 formula, written from its definition and without our code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.linalg import polar as scipy_polar

from loratools.fusion.base import FUSIONS
from loratools.fusion.content import content_key
from loratools.linalg.seeds import uniform

Tasks = Callable[..., tuple[list[Any], list[np.ndarray]]]
W = [0.7, 0.5, 0.3]
# Orthogonal factorisations of 23 x 17 matrices of condition below 1e3: eps * dim * condition, a factor for the steps.
CLOSE = 100 * np.finfo(np.float64).eps * 23 * 1e3  # 5e-10


def run(name: str, deltas: list[Any], weights: list[float], **settings: Any) -> np.ndarray:
    return np.asarray(FUSIONS[name].run(deltas, weights, **settings).dense())


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.linalg.norm(found - expected) <= CLOSE * np.linalg.norm(expected)


def total(dense: list[np.ndarray], weights: list[float]) -> np.ndarray:
    return sum(w * x for w, x in zip(weights, dense, strict=True))  # type: ignore[return-value]


def trimmed(x: np.ndarray, density: float) -> np.ndarray:
    kept = np.argsort(-np.abs(x).ravel())[: int(density * x.size)]
    mask = np.zeros(x.size, bool)
    mask[kept] = True
    return np.where(mask.reshape(x.shape), x, 0.0)


def elected(parts: list[np.ndarray], weights: list[float]) -> np.ndarray:
    stack = np.stack([w * x for w, x in zip(weights, parts, strict=True)])
    sign = np.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(stack) == sign
    return (stack * agree).sum(0) / np.maximum(agree.sum(0), 1)


def test_linear(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    assert_close(run("linear", deltas, W), total(dense, W))
    assert FUSIONS["linear"].run(deltas, W).rank == 8  # type: ignore[attr-defined]


def test_norm_equal(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    norms = [np.linalg.norm(x) for x in dense]
    assert_close(
        run("norm-equal", deltas, W), sum(w * np.mean(norms) / n * x for w, n, x in zip(W, norms, dense, strict=True))
    )


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(tasks: Tasks, t: float) -> None:
    deltas, (x, y) = tasks(3, 4)
    angle = np.arccos(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))
    expected = (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)
    assert_close(run("slerp", deltas, [1.0, 1.0], t=t), expected)
    if t == 0.3:
        assert_close(run("slerp", deltas, [0.7, 0.3]), expected)  # the share of the weights


def test_slerp_of_equal_updates_is_that_update(tasks: Tasks) -> None:
    (u,), (x,) = tasks(3)
    assert_close(run("slerp", [u, u], [1.0, 1.0]), x)
    assert_close(run("nuslerp", [u, u], [1.0, 1.0], by="row"), x)


@pytest.mark.parametrize("by", ["row", "column"])
def test_nuslerp_by_rows_and_columns(tasks: Tasks, by: str) -> None:
    deltas, dense = tasks(3, 4)
    x, y = dense if by == "row" else [d.T for d in dense]
    t, out = 0.3, []
    for p, q in zip(x, y, strict=True):
        angle = np.arccos(p @ q / np.linalg.norm(p) / np.linalg.norm(q))
        out.append((np.sin((1 - t) * angle) * p + np.sin(t * angle) * q) / np.sin(angle))
    assert_close(run("nuslerp", deltas, [0.7, 0.3], by=by), np.array(out) if by == "row" else np.array(out).T)


def test_multislerp_is_the_normalised_mean_direction(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    shares = np.array(W) / sum(W)
    mean = sum(s * x / np.linalg.norm(x) for s, x in zip(shares, dense, strict=True))
    size = sum(s * np.linalg.norm(x) for s, x in zip(shares, dense, strict=True))
    assert_close(run("multislerp", deltas, W), size * mean / np.linalg.norm(mean))


def test_karcher_has_no_mean_logarithm_left(tasks: Tasks) -> None:
    """The defining equation: at the mean, the weighted logarithms of all directions cancel."""
    deltas, dense = tasks(3, 1, 4)
    found = run("karcher", deltas, W)
    at = found / np.linalg.norm(found)
    step = np.zeros_like(at)
    for w, x in zip(W, dense, strict=True):
        unit = x / np.linalg.norm(x)
        cosine = np.sum(at * unit)
        step += w * np.arccos(cosine) * (unit - cosine * at) / np.sqrt(1 - cosine**2)
    assert np.linalg.norm(step) <= 1e-9  # the iteration's own tolerance is 1e-10, on weights of sum 1.5
    shares = np.array(W) / sum(W)
    assert np.isclose(np.linalg.norm(found), sum(s * np.linalg.norm(x) for s, x in zip(shares, dense, strict=True)))


def test_karcher_of_two_is_slerp_of_directions(tasks: Tasks) -> None:
    deltas, (x, y) = tasks(3, 4)
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    angle = np.arccos(np.sum(x * y))
    expected = (np.sin(0.75 * angle) * x + np.sin(0.25 * angle) * y) / np.sin(angle)
    found = run("karcher", deltas, [3.0, 1.0])
    assert np.linalg.norm(found / np.linalg.norm(found) - expected) <= 1e-9  # the iteration's tolerance is 1e-10


def test_model_stock(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    unit = [x / np.linalg.norm(x) for x in dense]
    c = max(0.0, np.mean([np.sum(unit[i] * unit[j]) for i in range(3) for j in range(i)]))
    expected = 3 * c / (1 + 2 * c) * sum(dense) / 3
    assert np.linalg.norm(run("model-stock", deltas, [1.0] * 3) - expected) <= CLOSE * np.linalg.norm(sum(dense))
    assert_close(run("model-stock", [deltas[0]] * 3, [1.0] * 3), dense[0])  # identical inputs: the same


def test_model_stock_of_orthogonal_updates_is_zero(tasks: Tasks) -> None:
    (u, v), _ = tasks(2, 2)
    b = np.linalg.qr(np.concatenate([u.b, v.b], axis=1))[0]
    apart = [type(u)(b[:, :2], u.a), type(u)(b[:, 2:], v.a)]
    assert np.linalg.norm(run("model-stock", apart, [1.0, 1.0])) <= CLOSE * np.linalg.norm(u.a)


def joint_basis(dense: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    u, s, vh = np.linalg.svd(np.concatenate(dense, axis=1), full_matrices=False)
    k = int(np.sum(s > 1e-9 * s[0]))
    parts = np.split(s[:k, None] * vh[:k], len(dense), axis=1)
    return u[:, :k], parts


@pytest.mark.parametrize("rule", ["sum", "ties", "magnitude"])
def test_knots(tasks: Tasks, rule: str) -> None:
    deltas, dense = tasks(3, 1, 4)
    u, parts = joint_basis(dense)
    inner = {
        "sum": lambda: total(parts, W),
        "magnitude": lambda: total([trimmed(p, 0.3) for p in parts], W),
        "ties": lambda: elected([trimmed(p, 0.3) for p in parts], W),
    }[rule]()
    assert_close(run("knots", deltas, W, rule=rule, density=0.3), u @ inner)


def test_knots_with_random_masks_by_content(tasks: Tasks) -> None:
    """The masks are the only thing that has to be known: U's signs drop out, because they flip whole rows."""
    deltas, dense = tasks(3, 1, 4)
    u, parts = joint_basis(dense)
    masks = [uniform(content_key(d, 4), *p.shape) < 0.6 for d, p in zip(deltas, parts, strict=True)]
    inner = elected([p * m / 0.6 for p, m in zip(parts, masks, strict=True)], W)
    assert_close(run("knots", deltas, W, rule="dare-ties", density=0.6, seed=4), u @ inner)


def core_frame(dense: list[np.ndarray], ranks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    tall, wide = [], []
    for x, r in zip(dense, ranks, strict=True):
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        tall.append(u[:, :r] * np.sqrt(s[:r]))
        wide.append(vh[:r].T * np.sqrt(s[:r]))
    left = np.linalg.svd(np.concatenate(tall, axis=1), full_matrices=False)[0]
    right = np.linalg.svd(np.concatenate(wide, axis=1), full_matrices=False)[0]
    return left, right, [left.T @ x @ right for x in dense]


def test_core_ties(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    left, right, cores = core_frame(dense, (3, 1, 4))
    expected = left @ elected([trimmed(c, 0.3) for c in cores], W) @ right.T
    assert_close(run("core", deltas, W, rule="ties", density=0.3), expected)


def test_core_dare_by_content(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    left, right, cores = core_frame(dense, (3, 1, 4))
    masks = [uniform(content_key(d, 0), *c.shape) < 0.5 for d, c in zip(deltas, cores, strict=True)]
    expected = left @ total([c * m / 0.5 for c, m in zip(cores, masks, strict=True)], W) @ right.T
    assert_close(run("core", deltas, W, rule="dare", density=0.5), expected)


def tsv_dense(dense: list[np.ndarray], ranks: tuple[int, ...], weights: list[float]) -> tuple[np.ndarray, list[float]]:
    us, ss, vs = [], [], []
    for x, r, w in zip(dense, ranks, weights, strict=True):
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        us.append(u[:, :r])
        ss += list(w * s[:r])
        vs.append(vh[:r].T)
    left, right = (scipy_polar(np.concatenate(x, axis=1))[0] for x in (us, vs))
    return (left * ss) @ right.T, ss


def test_tsv(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    expected, values = tsv_dense(dense, (3, 1, 4), W)
    found = run("tsv", deltas, W)
    assert_close(found, expected)
    # the singular values of the result are the union of the inputs'
    assert np.allclose(np.linalg.svd(found)[1][:8], sorted(np.abs(values), reverse=True), rtol=1e-9)


def test_tsv_in_the_core_frame_is_tsv(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    assert_close(run("core", deltas, W, rule="tsv"), tsv_dense(dense, (3, 1, 4), W)[0])


def test_tsv_of_orthogonal_tasks_is_the_sum(tasks: Tasks) -> None:
    (u, v), _ = tasks(2, 2)
    b = np.linalg.qr(np.concatenate([u.b, v.b], axis=1))[0]
    a = np.linalg.qr(np.concatenate([u.a, v.a], axis=0).T)[0].T
    apart = [type(u)(b[:, :2], a[:2]), type(u)(b[:, 2:], a[2:])]
    assert_close(run("tsv", apart, [1.0, 1.0]), b @ a)


def test_tsv_beyond_the_size_of_the_matrix_keeps_the_leading_share(tasks: Tasks) -> None:
    deltas, dense = tasks(10, 9)  # 19 directions do not fit into 17 columns: 8 of each
    expected, _ = tsv_dense(dense, (8, 8), [1.0, 1.0])
    assert_close(run("tsv", deltas, [1.0, 1.0]), expected)


def test_iso_c(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    u, s, vh = np.linalg.svd(total(dense, W), full_matrices=False)
    expected = s[:8].mean() * u[:, :8] @ vh[:8]
    assert_close(run("iso-c", deltas, W), expected)
    assert_close(run("core", deltas, W, rule="iso"), expected)
    assert_close(run("iso-c", deltas, W, scale=2.0), 2 * expected)


def test_iso_cts(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    u, s, vh = np.linalg.svd(total(dense, W), full_matrices=False)
    own = (8 - int(0.6 * 8)) // 3
    shared = 8 - 3 * own
    lefts, rights, values = [u[:, :shared]], [vh[:shared].T], list(s[:shared])
    for w, x in zip(W, dense, strict=True):
        p, t, qh = np.linalg.svd(w * (x - u[:, :shared] @ u[:, :shared].T @ x), full_matrices=False)
        lefts.append(p[:, :own])
        rights.append(qh[:own].T)
        values += list(t[:own])
    left, right = (scipy_polar(np.concatenate(x, axis=1))[0] for x in (lefts, rights))
    assert_close(run("iso-cts", deltas, W, common=0.6), np.mean(values) * left @ right.T)


def test_tucker_at_full_rank_is_the_sum(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    assert_close(run("tucker", deltas, W, rank=8), total(dense, W))


def test_tucker_is_a_fixed_point_and_captures_more_than_the_truncated_sum(tasks: Tasks) -> None:
    deltas, dense = tasks(4, 4, 4)
    found = run("tucker", deltas, W, rank=4)
    u, s, vh = np.linalg.svd(found, full_matrices=False)
    assert s[4] <= CLOSE * s[0]
    u, v = u[:, :4], vh[:4].T
    parts = [w * x for w, x in zip(W, dense, strict=True)]
    captured = sum(np.sum((u.T @ p @ v) ** 2) for p in parts)
    # its own projections give the result, and one more alternation improves nothing (captured stood still to 1e-10)
    assert_close(found, u @ (u.T @ sum(parts) @ v) @ v.T)
    again = np.linalg.eigh(sum(p @ v @ v.T @ p.T for p in parts))[1][:, -4:]
    assert sum(np.sum((again.T @ p @ v) ** 2) for p in parts) <= captured * (1 + 1e-6)
    a, _, bh = np.linalg.svd(sum(parts), full_matrices=False)
    assert captured > sum(np.sum((a[:, :4].T @ p @ bh[:4].T) ** 2) for p in parts)


@pytest.mark.parametrize("diagonal", [True, False])
def test_regmean_solves_the_least_squares_problem(tasks: Tasks, diagonal: bool) -> None:
    deltas, dense = tasks(3, 1, 4)
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal((40, 17)) * (1 + i) for i in range(3)]
    grams = [x.T @ x for x in inputs]
    grams = [np.diag(np.diag(g)) for g in grams] if diagonal else grams
    given = [np.diag(g) for g in grams] if diagonal else grams
    found = run("regmean", deltas, W, statistics=given, alpha=1.0)
    expected = sum(w * x @ g for w, x, g in zip(W, dense, grams, strict=True)) @ np.linalg.inv(
        sum(w * g for w, g in zip(W, grams, strict=True))
    )
    assert_close(found, expected)
    assert_close(run("regmean", deltas, W, statistics=[given[0]] * 3), total(dense, W) / sum(W))  # equal: weighted mean


def test_ties(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    expected = elected([trimmed(x, 0.3) for x in dense], W)
    assert_close(run("ties", deltas, W, density=0.3), expected)
    assert_close(run("ties", deltas, W, density=0.3, scale=0.5), expected / 2)


def test_ties_at_density_one_with_equal_signs_is_the_mean(tasks: Tasks) -> None:
    (u,), (x,) = tasks(3)
    scaled = [type(u)(u.b, u.a, s) for s in (1.0, 2.0, 3.0)]
    assert_close(run("ties", scaled, [1.0] * 3, density=1.0), 2 * x)


def test_magnitude(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    assert_close(run("magnitude", deltas, W, density=0.3), total([trimmed(x, 0.3) for x in dense], W))


@pytest.mark.parametrize("name", ["dare", "dare-ties"])
def test_dare(tasks: Tasks, name: str) -> None:
    deltas, dense = tasks(3, 1, 4)
    masks = [uniform(content_key(d, 3), 23, 17) < 0.4 for d in deltas]
    parts = [x * m / 0.4 for x, m in zip(dense, masks, strict=True)]
    assert_close(run(name, deltas, W, density=0.4, seed=3), total(parts, W) if name == "dare" else elected(parts, W))


def test_dare_is_the_sum_in_expectation(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    runs = [run("dare", deltas, W, density=0.5, seed=seed) for seed in range(200)]
    noise = np.sqrt(sum((w * np.linalg.norm(x)) ** 2 for w, x in zip(W, dense, strict=True)) / 200)
    assert np.linalg.norm(np.mean(runs, axis=0) - total(dense, W)) <= 2 * noise  # its standard deviation is 1 * noise


def test_della(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    parts = []
    for d, x in zip(deltas, dense, strict=True):
        rank = np.argsort(np.argsort(np.abs(x), axis=1), axis=1)
        p = 0.5 - 0.2 + rank * (0.4 / 16)
        parts.append(np.where(uniform(content_key(d, 0), 23, 17) < p, x / p, 0.0))
    assert_close(run("della", deltas, W, density=0.5, epsilon=0.2), elected(parts, W))


def test_breadcrumbs(tasks: Tasks) -> None:
    deltas, dense = tasks(3, 1, 4)
    size = 23 * 17
    parts = []
    for x in dense:
        order = np.argsort(-np.abs(x).ravel())[int(0.1 * size) : int(0.1 * size) + int(0.5 * size)]
        mask = np.zeros(size, bool)
        mask[order] = True
        parts.append(np.where(mask.reshape(x.shape), x, 0.0))
    assert_close(run("breadcrumbs", deltas, W, density=0.5, gamma=0.1), total(parts, W))
    # a share gamma below one entry drops none (and not everything)
    assert_close(
        run("breadcrumbs", deltas, W, density=0.999, gamma=0.001), total([trimmed(x, 0.999) for x in dense], W)
    )


def test_orthogonalise(tasks: Tasks) -> None:
    deltas, (x, y, z) = tasks(3, 1, 4)
    row_space = lambda *parts: np.linalg.svd(np.concatenate(parts, axis=0))[2]  # noqa: E731
    first, both = row_space(x)[:3], row_space(x, y)[:4]
    expected = W[0] * x + W[1] * (y - y @ first.T @ first) + W[2] * (z - z @ both.T @ both)
    assert_close(run("orthogonalise", deltas, W), expected)
    columns = [d.T for d in (x, y, z)]
    first, both = row_space(columns[0])[:3], row_space(*columns[:2])[:4]
    expected = W[0] * x + W[1] * (y - first.T @ first @ y) + W[2] * (z - both.T @ both @ z)
    assert_close(run("orthogonalise", deltas, W, side="output"), expected)


@pytest.mark.parametrize(("keep", "strength"), [(None, 1.0), (2, 1.0), (2, 0.4)])
def test_null_space(tasks: Tasks, keep: int | None, strength: float) -> None:
    deltas, (x, y, z) = tasks(3, 1, 4)
    v = np.linalg.svd(x)[2][: keep or 3]
    off = np.eye(17) - strength * v.T @ v
    assert_close(run("null-space", deltas, W, keep=keep, strength=strength), W[0] * x + W[1] * y @ off + W[2] * z @ off)
