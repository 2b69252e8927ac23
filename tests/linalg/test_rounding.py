from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401 - registers the short floats
import numpy as np
import pytest

from loratools.errors import UsageError
from loratools.linalg.namespace import to_numpy, up
from loratools.linalg.rounding import rounded
from loratools.linalg.seeds import key_of

SHORT = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
KEY = key_of(1, "x")


def values() -> Any:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((50, 70)) * np.exp(rng.uniform(-12, 3, (50, 70)))).astype(np.float32)


@pytest.mark.parametrize("dtype", SHORT)
def test_stochastic_takes_a_neighbour_and_is_right_on_average(dtype: str, library: Callable[[Any], Any]) -> None:
    x = values()
    found = up(to_numpy(rounded(library(x), dtype, mode="stochastic", key=KEY)))
    near = up(rounded(x, dtype))
    step = np.abs(found - x)
    other = np.abs(near - x)
    assert np.all(step >= other)  # the nearest one, or the one on the other side
    assert np.all((found == near) | ((found - x) * (near - x) <= 0))
    spread = np.sqrt(np.sum(step * other))  # variance of each draw: distance down times distance up
    assert abs(np.sum(found.astype(np.float64) - x)) <= 6 * spread


@pytest.mark.parametrize("dtype", SHORT)
def test_blocks_give_what_the_whole_gives(dtype: str) -> None:
    x = values()
    whole = rounded(x, dtype, mode="stochastic", key=KEY)
    parts = [rounded(x[i : i + 7], dtype, mode="stochastic", key=KEY, row=i) for i in range(0, 50, 7)]
    assert whole.tobytes() == np.concatenate(parts).tobytes()


@pytest.mark.parametrize("dtype", SHORT)
def test_values_that_fit_stay(dtype: str) -> None:
    x = up(rounded(values(), dtype))
    assert np.array_equal(up(rounded(x, dtype, mode="stochastic", key=KEY)), x)
    for mode in ("nearest", "stochastic"):
        assert np.array_equal(rounded(x, "float32", mode=mode), x)
    ends = np.array([[0.0, -0.0, float(np.abs(x).max())]], np.float32)
    assert np.array_equal(up(rounded(ends, dtype, mode="stochastic", key=KEY)), ends)


def test_what_does_not_fit_is_left_to_be_found() -> None:
    x = np.array([[1e5, np.inf, np.nan]], np.float32)
    assert not np.isfinite(rounded(x, "float16").astype(np.float32)).any()
    with pytest.raises(UsageError, match="unknown rounding"):
        rounded(x, "float16", mode="up")
