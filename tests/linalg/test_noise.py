from __future__ import annotations

import numpy as np
import pytest

from loratools.errors import UsageError
from loratools.linalg.namespace import down, up
from loratools.linalg.noise import noise_edge, rounding_variance


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(512, 512), (600, 150)])
def test_the_edge_is_the_top_of_the_noise(dtype, shape):
    w = (0.02 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    noise = up(down(w, dtype)) - w
    top = np.linalg.svd(noise, compute_uv=False)[0]
    # finite-size fluctuation of the edge is of order n^(-2/3): 1.6% here
    assert noise_edge(w, dtype) == pytest.approx(top, rel=0.03)
    assert rounding_variance(w, dtype) == pytest.approx(noise.var(), rel=0.02)


def test_both_libraries(library):
    w = np.random.default_rng(1).standard_normal((20, 30)).astype(np.float32)
    assert noise_edge(library(w), "bfloat16") == pytest.approx(noise_edge(w, "bfloat16"), rel=1e-6)


def test_zeros_and_subnormals_are_finite():
    w = np.array([[0.0, 1e-7], [1e-40, 1.0]], np.float32)
    assert np.isfinite(noise_edge(w, "float16"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_full_precision_has_no_edge(dtype):
    with pytest.raises(UsageError):
        noise_edge(np.ones((2, 2), np.float32), dtype)
