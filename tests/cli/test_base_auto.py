from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def dora(tmp_path: Path, digits: Path) -> Path:
    """The trained DoRA adapter, saying that its base is org/digits."""
    folder = tmp_path / "dora"
    shutil.copytree(digits / "r32-dora", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/digits"}))
    return folder


def test_the_base_that_the_adapter_names_is_taken_from_the_cache(
    run: Callable[..., Any], dora: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--org--digits" / "snapshots" / "abc"
    shutil.copytree(digits / "base", snapshot)
    assert run("squeeze", dora, "--rank", 4, "--base", "auto", "-o", tmp_path / "auto").code == 0
    assert run("squeeze", dora, "--rank", 4, "--base", digits / "base", "-o", tmp_path / "path").code == 0
    assert run("squeeze", dora, "--rank", 4, "-o", tmp_path / "without").code == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("auto", "path", "without")]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]  # the magnitude was refitted


def test_a_base_that_is_not_there_is_told_with_the_command(
    run: Callable[..., Any], dora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    result = run("squeeze", dora, "--rank", 4, "--base", "auto", "-o", tmp_path / "out")
    assert result.code == 2
    assert "hf download org/digits" in result.err
    assert not (tmp_path / "out").exists()
