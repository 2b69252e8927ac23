"""Models on the disk, and PEFT's meaning of an adapter as the oracle."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loratools.core.adapter import Adapter, Meta
from loratools.core.update import Update


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    """make("llama", r=4, ...) -> a base model, its PEFT adapter on disk, and PEFT's merge."""
    file = Path(__file__).parents[1] / "formats" / "conftest.py"
    spec = importlib.util.spec_from_file_location("peft_models", file)
    assert spec is not None
    assert spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    return lambda model, **config: models.Made(model, tmp_path / "adapter", **config)


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """model({name: array}, shards=2, **config) -> a model directory with an index (one file for one shard)."""

    def write(tensors: Mapping[str, Any], *, shards: int = 1, folder: str = "base", **config: Any) -> Path:
        target = tmp_path / folder
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config))
        (target / "tokenizer.json").write_text("{}")
        (target / "README.md").write_text("# base\n")
        names = list(tensors)
        if shards == 1:
            save_file(dict(tensors), target / "model.safetensors", metadata={"format": "pt", "made": "here"})
            return target
        table = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = names[i::shards]
            save_file({n: tensors[n] for n in part}, target / file, metadata={"format": "pt"})
            table |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1, "note": "kept"}, "weight_map": table}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
        return target

    return write


@pytest.fixture
def adapter_of() -> Callable[..., Adapter]:
    """adapter_of({name: update}, **config) -> an adapter in memory."""

    def make(updates: Mapping[str, Update], **config: Any) -> Adapter:
        return Adapter(dict(updates), Meta(config=config))

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every test."""
    return np.random.default_rng(0)
