"""Kernels run here on the GPU there is, else under Triton's interpreter; fresh memory holds NaN: gaps are seen."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every output buffer with NaN before a kernel writes to it."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Any:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-1)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def random() -> Callable[..., Any]:
    """A function (rows, columns, dtype, seed) -> normal numbers inside a buffer of NaN: nothing outside may enter."""

    def make(rows: int, columns: int, dtype: Any = torch.float32, seed: int = 0, size: float = 1.0) -> Any:
        generator = torch.Generator().manual_seed(1000 * rows + 10 * columns + seed)
        values = size * torch.randn(rows, columns, generator=generator)
        frame = torch.full((rows + 2, columns + 8), float("nan"), dtype=dtype)
        frame[1 : rows + 1, :columns] = values.to(dtype)
        return frame.to(DEVICE)[1 : rows + 1, :columns]

    return make


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only kernels answer."""
    monkeypatch.setenv("LORATOOLS_KERNELS", "force")
