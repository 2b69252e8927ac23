"""Shared fixtures: both array libraries, the committed fixtures, and the real adapters where they are named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run here without a GPU

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "fixtures" / "digits"


@pytest.fixture(params=["numpy", "torch"])
def library(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """A function that turns NumPy arrays into arrays of one library."""
    if request.param == "numpy":
        return np.asarray
    torch = pytest.importorskip("torch", reason="torch is not installed")
    return lambda x: torch.from_numpy(np.ascontiguousarray(x))


@pytest.fixture
def digits() -> Path:
    """The directory of the committed small model and its adapters."""
    return DIGITS


@pytest.fixture
def real() -> Path:
    """The directory of real adapters, trained by others."""
    where = os.environ.get("LORATOOLS_REAL_ADAPTERS")
    if not where:
        pytest.skip("LORATOOLS_REAL_ADAPTERS is not set")
    return Path(where)
