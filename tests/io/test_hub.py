from __future__ import annotations

import os
from pathlib import Path

import pytest

from loratools.errors import FileError
from loratools.io.hub import cached_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def snapshot(cache: Path, name: str, *, model: str = "org/name") -> Path:
    folder = cache / f"models--{model.replace('/', '--')}" / "snapshots" / name
    folder.mkdir(parents=True)
    return folder


def test_the_reference_names_the_snapshot(cache: Path) -> None:
    named, other = snapshot(cache, "aaa"), snapshot(cache, "bbb")
    os.utime(named, (1, 1))
    assert cached_model("org/name") == other  # the newest, where no reference is there
    (cache / "models--org--name" / "refs").mkdir()
    (cache / "models--org--name" / "refs" / "main").write_text("aaa\n")
    assert cached_model("org/name") == named


def test_a_reference_to_nothing_is_passed_over(cache: Path) -> None:
    found = snapshot(cache, "aaa")
    (cache / "models--org--name" / "refs").mkdir()
    (cache / "models--org--name" / "refs" / "main").write_text("gone")
    assert cached_model("org/name") == found


def test_a_local_path_is_itself(tmp_path: Path) -> None:
    assert cached_model(str(tmp_path)) == tmp_path


def test_what_is_not_there_is_told_with_the_command(cache: Path) -> None:
    with pytest.raises(FileError, match="hf download org/name"):
        cached_model("org/name")


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"), ("HOME", ".cache/huggingface/hub")],
)
def test_the_cache_is_where_the_hub_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, below: str
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    found = snapshot(tmp_path / below, "aaa")
    assert cached_model("org/name") == found
