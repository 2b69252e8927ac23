"""Coats: updates that become a difference only together with a base; every one of the registry is found."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest

from loratools.core.coat import Coat
from loratools.core.generic import transposed
from loratools.core.rows import rowwise
from loratools.core.update import KINDS, Delta
from loratools.errors import ConversionError, FormatError, MismatchError
from loratools.kinds.block_diagonal import BlockDiagonal
from loratools.kinds.composed import Composed
from loratools.kinds.dense import Dense
from loratools.kinds.head import Head
from loratools.kinds.lowrank import LowRank, low_rank
from loratools.kinds.modulated import Modulated
from loratools.kinds.multiplied import Multiplied
from loratools.kinds.scaled import Scaled
from loratools.kinds.together import Together

COATS = [name for name in KINDS if issubclass(KINDS[name], Coat)]
rng = np.random.default_rng(0)
EPS = 2.0**-53


def base_for(u: Any) -> Any:
    return np.random.default_rng(1).standard_normal(u.shape)


@pytest.mark.parametrize("name", COATS)
def test_the_difference_on_a_base_is_an_operator(name: str) -> None:
    u = KINDS[name].example(3)
    d = u.delta(base_for(u))
    assert isinstance(d, Delta)
    m, n = d.matrix_shape
    dense = d.matrix()
    x, y = rng.standard_normal((n, 3)), rng.standard_normal((m, 2))
    bound = 64 * EPS * max(m, n) * np.abs(dense).max() * 4  # sums of max(m, n) terms of that size
    assert np.abs(d.matmul(x) - dense @ x).max() <= bound
    assert np.abs(d.rmatmul(y) - dense.T @ y).max() <= bound
    flat = low_rank(d)
    if flat is not None:
        assert np.abs(flat.dense() - d.dense()).max() <= bound


@pytest.mark.parametrize("name", COATS)
def test_rows_alone_are_rows_of_the_whole(name: str) -> None:
    u = KINDS[name].example(3)
    rows = rowwise(u)
    if rows is None:
        return
    w = base_for(u)
    assert np.allclose(rows(1, 4).apply(w[1:4]), u.apply(w)[1:4], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", COATS)
def test_the_transpose_changes_the_transposed_base(name: str) -> None:
    u = KINDS[name].example(3)
    w = base_for(u)
    if name in ("network", "bat"):  # PEFT has them on nn.Linear alone, and no kind says the same of rows
        with pytest.raises(ConversionError):
            transposed(u)
        return
    assert np.allclose(transposed(u).apply(w.T), u.apply(w).T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", COATS)
def test_another_base_is_refused(name: str) -> None:
    u = KINDS[name].example(3)
    for w in (None, np.zeros((3, 2))):
        with pytest.raises(MismatchError, match=name):
            u.apply(w)


def test_scaled_by_rows_columns_and_channels() -> None:
    w, gain = rng.standard_normal((3, 4, 2, 2)), rng.standard_normal(4)
    u = Scaled(gain, (3, 4, 2, 2), 1)
    assert np.allclose(u.apply(w), w * gain[None, :, None, None])
    d = u.delta(w)
    x = rng.standard_normal((16, 2))
    assert np.allclose(d.matmul(x), d.matrix() @ x)
    assert np.allclose(Scaled(gain[:3], (3,)).apply(w[:, 0, 0, 0]), w[:, 0, 0, 0] * gain[:3])
    with pytest.raises(FormatError, match="gain"):
        Scaled(gain, (3, 5), 1)


def test_modulated_by_a_factor_without_factors() -> None:
    w, f = rng.standard_normal((4, 5)), rng.standard_normal((4, 5))
    d = Modulated(Dense(f)).delta(w)
    x, y = rng.standard_normal((5, 2)), rng.standard_normal((4, 2))
    assert np.allclose(d.dense(), w * f)
    assert np.allclose(d.matmul(x), (w * f) @ x)
    assert np.allclose(d.rmatmul(y), (w * f).T @ y)


@pytest.mark.parametrize("spread", [1, 2, 3, 6])
def test_spread_blocks_take_halves_that_lie_apart(spread: int) -> None:
    blocks = rng.standard_normal((6, 4, 4))
    u = BlockDiagonal(blocks, spread)
    expected = np.zeros((24, 24))
    for i, block in enumerate(blocks):  # block i takes the halves h and h + spread of its group
        group, at = divmod(i, spread)
        first = (group * 2 * spread + at) * 2
        places = (
            [first, first + 1, first + 2 * spread, first + 2 * spread + 1] if spread > 1 else range(4 * i, 4 * i + 4)
        )
        expected[np.ix_(list(places), list(places))] = block
    assert np.array_equal(u.dense(), expected)
    x = rng.standard_normal((24, 3))
    assert np.allclose(u.rmatmul(x), expected.T @ x)
    assert np.allclose(transposed(u).dense(), expected.T)


def test_blocks_that_cannot_be_spread_are_refused() -> None:
    for blocks, spread in ((np.zeros((4, 3, 3)), 2), (np.zeros((3, 2, 2)), 2), (np.zeros((2, 2, 3)), 1)):
        with pytest.raises(FormatError):
            BlockDiagonal(blocks, spread)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(6, 8), (6, 2, 2, 2), (5, 1)])
def test_a_multiplier_of_low_rank_makes_a_change_of_that_rank(axis: int, shape: tuple[int, ...]) -> None:
    size = shape[0] if axis == 0 else prod(shape[1:])
    factor = LowRank(rng.standard_normal((size, 2)), rng.standard_normal((2, size)), 0.5)
    w = rng.standard_normal(shape)
    flat = w.reshape(shape[0], -1)
    u = Multiplied(factor, shape, axis)
    true = factor.dense() @ flat if axis == 0 else flat @ factor.dense()
    found = low_rank(u.delta(w))
    assert found is not None
    assert found.rank == 2
    assert np.allclose(found.dense(), true.reshape(shape))
    assert np.allclose(u.apply(w), w + true.reshape(shape))


def test_steps_act_one_after_the_other_and_parts_on_the_same_base() -> None:
    w, gain, f = rng.standard_normal((4, 4)), rng.standard_normal(4), Dense(rng.standard_normal((4, 4)))
    turn, scale = Multiplied(f, (4, 4)), Scaled(gain, (4, 4))
    assert np.allclose(Composed((turn, scale)).apply(w), gain[:, None] * (w + w @ f.dense()))
    assert np.allclose(Together((turn, scale)).apply(w), w + w @ f.dense() + (gain[:, None] - 1) * w)
    for whole in (Composed, Together):
        with pytest.raises(FormatError):
            whole((turn, Scaled(gain, (4, 3))))


def test_head_keeps_the_leading_triplets_whatever_their_signs() -> None:
    w, d = rng.standard_normal((5, 7)), LowRank(rng.standard_normal((5, 2)), rng.standard_normal((2, 7)))
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    expected = (u[:, :3] * s[:3]) @ vh[:3] + d.dense()
    assert np.allclose(Head(d, 3).apply(w), expected)
    assert np.linalg.matrix_rank(Head(d, 3).delta(w).dense()) <= 2 + 2
    with pytest.raises(FormatError, match="singular values"):
        Head(d, 5)
