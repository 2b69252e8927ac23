from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.core import generic
from loratools.core.rows import rowwise
from loratools.errors import FormatError, LoratoolsError, MismatchError
from loratools.io.bundle import memory_leaf
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank, low_rank, low_ranks, with_low_ranks
from loratools.kinds.stack import Stack, stacked
from loratools.kinds.sum import Sum
from loratools.leaf import Leaf
from loratools.linalg.namespace import to_numpy

EPS = np.finfo(np.float32).eps
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))


def stack(experts: int, out: int, width: int, rank: int, *, seed: int = 0, scale: float = 0.5) -> Stack:
    rng = np.random.default_rng(seed)
    b, a = (rng.standard_normal(s).astype(np.float32) for s in ((experts, out, rank), (experts, rank, width)))
    return Stack(b, a, scale)


def naive(u: Stack) -> np.ndarray[Any, Any]:
    b, a = (to_numpy(t).astype(np.float64) for t in (u.b, u.a))
    return np.stack([u.scale * b[e] @ a[e] for e in range(len(b))])


@given(SHAPES)
@settings(max_examples=30, deadline=None)
def test_every_expert_is_its_own_product(shape: tuple[int, int, int, int]) -> None:
    u = stack(*shape)
    exact = naive(u)
    bound = 16 * EPS * shape[3] * max(np.abs(exact).max(), 1)  # sums of r products
    assert np.abs(u.dense() - exact).max() <= bound
    for e, part in enumerate(low_ranks(u) or ()):
        assert part.shape == u.shape[1:]
        assert np.abs(part.dense() - exact[e]).max() <= bound
    assert low_rank(u) is None  # no single pair says a stack


@given(SHAPES)
@settings(max_examples=30, deadline=None)
def test_singular_values_are_those_of_all_experts(shape: tuple[int, int, int, int]) -> None:
    u = stack(*shape)
    each = np.linalg.svd(naive(u), compute_uv=False)
    own = min(shape[1], shape[2], shape[3])
    expected = np.sort(each[:, :own].ravel())[::-1]
    assert np.allclose(to_numpy(generic.svdvals(u)), expected, atol=1e-6 * expected[0])
    assert abs(generic.norm(u) - np.sqrt((each**2).sum())) <= 1e-6 * np.sqrt((each**2).sum())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_unequal_ranks_are_padded_with_zeros(ranks: list[int], lazy: bool) -> None:
    rng = np.random.default_rng(0)
    wrap = (lambda x: memory_leaf("x", x)) if lazy else (lambda x: x)
    parts = [LowRank(*(wrap(rng.standard_normal(s).astype(np.float32)) for s in ((5, r), (r, 6))), 2.0) for r in ranks]
    u = stacked(parts, (len(parts), 5, 6))
    assert isinstance(u.b, Leaf) == lazy
    assert (u.rank, u.scale) == (max(ranks), 2.0)
    for part, back in zip(parts, low_ranks(u) or (), strict=True):
        assert np.array_equal(to_numpy(back.b)[:, : part.rank], to_numpy(part.b))
        assert not to_numpy(back.b)[:, part.rank :].any()
        assert not to_numpy(back.a)[part.rank :].any()


def test_unequal_scales_are_folded_into_b() -> None:
    one, other = (LowRank(np.ones((2, 1), np.float32), np.ones((1, 3), np.float32), s) for s in (2.0, -0.5))
    u = stacked((one, other), (2, 2, 3))
    assert u.scale == 1.0
    assert np.array_equal(u.dense(), np.stack([one.dense(), other.dense()]))


def test_a_stored_stack_is_read_once_for_all_experts() -> None:
    reads = []
    whole = stack(3, 4, 5, 2)

    def leaf(x: Any) -> Leaf:
        return Leaf(x.shape, "float32", lambda out: reads.append(1) or x)  # type: ignore[func-returns-value]

    parts = low_ranks(Stack(leaf(whole.b), leaf(whole.a), 0.5)) or ()
    assert not reads
    assert np.array_equal(np.stack([p.dense() for p in parts]), whole.dense())
    assert len(reads) == 2


def test_a_convolution_in_groups_has_more_axes() -> None:
    u = stack(2, 4, 18, 3)
    conv = Stack(u.b, u.a, u.scale, (2, 4, 2, 3, 3))
    assert np.array_equal(conv.dense(), u.dense().reshape(2, 4, 2, 3, 3))
    back = with_low_ranks(conv, low_ranks(conv) or ())
    assert back.shape == conv.shape


@pytest.mark.parametrize(
    ("b", "a", "shape"),
    [((2, 3, 1), (3, 1, 4), ()), ((2, 3, 1), (2, 2, 4), ()), ((2, 3), (2, 3), ()), ((2, 3, 0), (2, 0, 4), ()),
     ((2, 3, 1), (2, 1, 4), (2, 4, 3))],
)  # fmt: skip
def test_factors_that_do_not_fit_are_refused(b: tuple[int, ...], a: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError):
        Stack(np.zeros(b, np.float32), np.zeros(a, np.float32), 1.0, shape)


def test_inner_products_with_other_kinds_of_the_same_shape() -> None:
    u, v = stack(3, 4, 5, 2), stack(3, 4, 5, 3, seed=1)
    exact = float((naive(u) * naive(v)).sum())
    dense = Dense(v.dense())
    for got in (generic.inner(u, v), generic.inner(u, dense), generic.inner(dense, u)):
        assert abs(got - exact) <= 1e-6 * np.linalg.norm(naive(u)) * np.linalg.norm(naive(v))
    with pytest.raises(MismatchError):
        generic.inner(u, stack(3, 5, 4, 2))


def test_a_sum_of_stacks_is_one_stack_of_added_ranks() -> None:
    u, v = stack(3, 4, 5, 2), stack(3, 4, 5, 3, seed=1, scale=-1.0)
    total = Sum((u, v))
    assert total.matrix_shape == u.matrix_shape
    back = with_low_ranks(total, low_ranks(total) or ())
    assert isinstance(back, Stack)
    assert back.rank == 5
    assert np.abs(back.dense() - (naive(u) + naive(v))).max() <= 64 * EPS * np.abs(naive(u)).max()
    assert low_ranks(Sum((u, Dense(v.dense())))) is None


def test_rows_are_experts() -> None:
    u = stack(4, 3, 5, 2)
    rows = rowwise(u)
    assert rows is not None
    w = np.random.default_rng(3).standard_normal(u.shape).astype(np.float32)
    assert np.array_equal(rows(1, 3).apply(w[1:3]), u.apply(w)[1:3])


def test_more_triplets_than_there_are_complete_a_basis() -> None:
    u = stack(2, 4, 4, 1)
    left, s, right = (to_numpy(t) for t in generic.svd(u, 5))
    assert np.abs(left.T @ left - np.eye(5)).max() <= 1e-5
    assert np.abs(left * s @ right - to_numpy(u.matrix())).max() <= 1e-5
    with pytest.raises(LoratoolsError):
        generic.svd(u, 9)
