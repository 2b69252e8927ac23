"""Every contract of this room is run on both array libraries: ``array`` makes arrays of the one under test."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch

SAME_IN_NUMPY = ("float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool")


def to_torch(x: np.ndarray) -> torch.Tensor:
    x = np.ascontiguousarray(x)
    if x.dtype.name in SAME_IN_NUMPY:
        return torch.from_numpy(x.copy())
    bits = x.view(np.uint8 if x.itemsize == 1 else np.int16).copy()
    return torch.from_numpy(bits).view(getattr(torch, x.dtype.name))


@pytest.fixture(scope="session", params=["numpy", "torch"])
def array(request: pytest.FixtureRequest) -> Callable:
    """Return a function (values, dtype name or None) -> array of the library under test."""

    def make(values, dtype=None):
        x = np.asarray(values)
        if dtype is not None:
            x = x.astype(getattr(ml_dtypes, dtype, None) or np.dtype(dtype))
        return x if request.param == "numpy" else to_torch(x)

    return make
