from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loratools.io.base import Base
from loratools.io.safetensors import read_header
from loratools.io.save_like import copy_tensor, index_like, layout_like, shards_like, small_files
from loratools.io.write import TensorPlan

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(
        {"a": np.ones((4, 3), np.float16), "b": np.arange(5, dtype=np.int64)}, folder / ONE, metadata={"format": "pt"}
    )
    save_file({"c": np.ones(2, np.float32)}, folder / TWO, metadata={"format": "mlx"})
    table = {"c": TWO, "a": ONE, "b": ONE}
    said = {"metadata": {"total_size": 0, "total_parameters": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(said))
    for name in ("config.json", "README.md", "tokenizer.json", "optimizer.pt"):
        (folder / name).write_text("{}")
    return folder


def test_an_unchanged_shard_keeps_its_header_byte_for_byte(model: Path) -> None:
    base = Base.open(model)
    shards = shards_like(base, {}, {})
    assert [(s.name, [t.name for t in s.plan], dict(s.metadata)) for s in shards] == [
        (ONE, [n for n, f in base.files.items() if f.name == ONE], {"format": "pt"}),
        (TWO, ["c"], {"format": "mlx"}),
    ]
    laid = layout_like(shards[0])
    assert (model / ONE).read_bytes().startswith(laid.header)
    assert laid.starts == {name: entry.start for name, entry in read_header(model / ONE).entries.items()}
    assert laid.nbytes == (model / ONE).stat().st_size


def test_changed_added_and_dropped_tensors(model: Path) -> None:
    base = Base.open(model)
    shards = shards_like(
        base, {"a": TensorPlan("a", "float16", (6, 3))}, {"d": TensorPlan("d", "float16", (2,))}, frozenset({"b"})
    )
    assert [[(t.name, t.shape) for t in s.plan] for s in shards] == [[("a", (6, 3))], [("c", (2,)), ("d", (2,))]]
    laid = layout_like(shards[1])
    assert laid.starts["d"] - laid.starts["c"] == 8
    name, text = index_like(base, shards) or ("", "")
    said = json.loads(text)
    assert name == "model.safetensors.index.json"
    assert said["weight_map"] == {"c": TWO, "a": ONE, "d": TWO}
    assert said["metadata"] == {"total_size": 36 + 8 + 4, "total_parameters": 18 + 2 + 2}


def test_an_order_that_would_not_be_aligned_is_given_up(tmp_path: Path) -> None:
    save_file({"a": np.ones(3, np.float16)}, tmp_path / "model.safetensors")
    (shard,) = shards_like(Base.open(tmp_path), {}, {"z": TensorPlan("z", "float32", (2,))})
    assert list(layout_like(shard).plan) == ["z", "a"]


def test_one_file_has_no_index(tmp_path: Path) -> None:
    save_file({"a": np.ones(3, np.float16)}, tmp_path / "model.safetensors")
    base = Base.open(tmp_path)
    assert index_like(base, shards_like(base, {}, {})) is None
    assert small_files(Base.open(tmp_path / "model.safetensors")) == ()


def test_small_files(model: Path) -> None:
    assert [p.name for p in small_files(Base.open(model))] == ["README.md", "config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3), np.array(7, np.int8), np.zeros((0, 3)), np.arange(1 << 19)]
)
def test_bytes_are_copied_as_they_are(array: Any, tmp_path: Path) -> None:
    import os

    save_file({"a": array, "z": np.ones(3)}, tmp_path / "model.safetensors")
    fd = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    copy_tensor(fd, Base.open(tmp_path).leaf("a"), 8, tmp_path / "copy")
    os.close(fd)
    assert (tmp_path / "copy").read_bytes()[8:] == array.tobytes()
