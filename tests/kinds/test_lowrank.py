from __future__ import annotations

import numpy as np
import pytest

from loratools.errors import FormatError
from loratools.kinds.lowrank import LowRank, concatenate
from loratools.kinds.sum import Sum

RNG = np.random.default_rng(0)


def pair(m: int, r: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.standard_normal((m, r)).astype(np.float32), RNG.standard_normal((r, n)).astype(np.float32)


@pytest.mark.parametrize(
    ("b", "a", "shape", "what"),
    [
        ((4, 2), (3, 5), (), "do not multiply"),
        ((4,), (2, 5), (), "do not multiply"),
        ((4, 0), (0, 5), (), "no elements"),
        ((4, 2), (2, 5), (4, 6), "do not fit"),
    ],
)
def test_wrong_factors_are_refused(b: tuple[int, ...], a: tuple[int, ...], shape: tuple[int, ...], what: str) -> None:
    with pytest.raises(FormatError, match=what):
        LowRank(np.zeros(b, np.float32), np.zeros(a, np.float32), 1.0, shape)


def test_a_convolution_keeps_its_shape() -> None:
    b, a = pair(4, 2, 27)
    u = LowRank(b, a, 0.5, (4, 3, 3, 3))
    assert u.dense().shape == (4, 3, 3, 3)
    assert np.allclose(u.dense().reshape(4, 27), 0.5 * b @ a)


def test_apply_rounds_once() -> None:
    """bf16-sized steps: the sum is formed in fp32 and rounded to the base's dtype at the end."""
    b, a = pair(6, 2, 5)
    w = RNG.standard_normal((6, 5)).astype(np.float16)
    u = LowRank(b, a, 0.25)
    exact = w.astype(np.float64) + 0.25 * b.astype(np.float64) @ a.astype(np.float64)
    ulp = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
    assert np.all(np.abs(u.apply(w) - exact) <= 0.5001 * ulp)


def test_concatenation_is_the_exact_sum() -> None:
    u, v = LowRank(*pair(6, 2, 5), 2.0), LowRank(*pair(6, 3, 5), -0.5)
    both = concatenate((u, v))
    assert both.rank == 5
    assert np.allclose(both.dense(), u.dense() + v.dense(), atol=1e-5)
    assert np.allclose(both.dense(), Sum((u, v)).dense(), atol=1e-5)


def test_scale_may_be_zero_or_negative() -> None:
    b, a = pair(3, 2, 4)
    assert not LowRank(b, a, 0.0).dense().any()
    assert np.allclose(LowRank(b, a, -2.0).dense(), -2.0 * b @ a)
