"""Checkpoints in memory or on disk, and what every test of a reader compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt
from loratools.core.adapter import Adapter

Array = np.ndarray[Any, Any]
Tensors = Mapping[str, Array]


class Dice:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> Array:
        return (self.rng.standard_normal(shape) * 0.3).astype(np.float32)


@pytest.fixture
def dice() -> Dice:
    return Dice(11)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Adapter]:
    """read(tensors, base=..., reader=..., settings=..., files=..., config=...) -> adapter, through files."""

    calls: list[int] = []

    def load(
        tensors: Tensors, *, base: Tensors | None = None, said: str = "", config: dict[str, Any] | None = None
    ) -> Adapter:
        if config is not None:
            return lt.from_state_dict(dict(tensors), config, base=None if base is None else dict(base))
        calls.append(1)
        folder = tmp_path / str(len(calls))
        folder.mkdir()
        path = folder / "checkpoint.safetensors"
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
        if said:
            for side in tmp_path.glob("*.json"):
                (folder / side.name).write_bytes(side.read_bytes())
            path = folder / "manifest.toml"
            path.write_text(f'manifest = 1\nweights = "checkpoint.safetensors"\n{said}')
        return lt.load(path, base=None if base is None else dict(base))

    return load
