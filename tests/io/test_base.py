from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from loratools.errors import FileError, FormatError, MismatchError
from loratools.io.base import Base

FIRST = {"model.b.weight": np.ones((2, 3), np.float16), "model.a.weight": np.arange(4, dtype=np.float32)}
SECOND = {"lm_head.weight": np.full((3, 2), 2, ml_dtypes.bfloat16)}
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model in two shards with an index, a config, and an adapter that lies beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(FIRST, folder / ONE, metadata={"format": "pt"})
    save_file(SECOND, folder / TWO, metadata={"format": "mlx"})
    _index(folder, {**dict.fromkeys(FIRST, ONE), **dict.fromkeys(SECOND, TWO)})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"lora": np.zeros(1)}, folder / "adapter_model.safetensors")
    return folder


def _index(folder: Path, table: Any) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": table}))
    return folder / INDEX


def test_shards_with_an_index(model: Path) -> None:
    base = Base.open(model)
    assert dict(base.shapes) == {"model.a.weight": (4,), "model.b.weight": (2, 3), "lm_head.weight": (3, 2)}
    assert dict(base.dtypes) == {"model.a.weight": "float32", "model.b.weight": "float16", "lm_head.weight": "bfloat16"}
    assert list(base) == list(base.shapes) and len(base) == 3
    for name, array in {**FIRST, **SECOND}.items():
        np.testing.assert_array_equal(base[name], array)
        assert base[name].dtype == array.dtype and base.leaf(name).shape == array.shape
    assert base.config == {"model_type": "llama"}
    assert base.files == {"model.a.weight": model / ONE, "model.b.weight": model / ONE, "lm_head.weight": model / TWO}
    assert base.metadata == {model / ONE: {"format": "pt"}, model / TWO: {"format": "mlx"}}
    assert base.path == model


def test_the_same_without_an_index_or_by_its_index(model: Path) -> None:
    wanted = Base.open(model)
    assert Base.open(model / INDEX).files == wanted.files
    (model / INDEX).unlink()
    assert Base.open(model).files == wanted.files


def test_a_single_file_and_a_directory_with_one(tmp_path: Path) -> None:
    save_file(FIRST, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"x": 1}')
    for source in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        base = Base.open(source)
        assert set(base) == set(FIRST) and base.config == {"x": 1}


def test_in_memory() -> None:
    base = Base.open(FIRST)
    np.testing.assert_array_equal(base["model.a.weight"], FIRST["model.a.weight"])
    assert (dict(base.config), dict(base.files), base.path) == ({}, {}, None)
    assert Base.open(base) is base
    with pytest.raises(FormatError, match="dtype") as caught:
        Base.open({"t": np.array(["text"])})
    assert caught.value.parameter == "t"


def test_torch_in_memory_stays_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    base = Base.open({"t": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)})
    assert base.dtypes == {"t": "bfloat16"} and isinstance(base["t"], torch.Tensor) and not base["t"].requires_grad


def test_memory_is_handed_out_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Base.open(FIRST)["model.a.weight"][:] = 0


def test_asking_for_a_name_reads_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base.open(model)
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a tensor was read"))
    assert "lm_head.weight" in base and "nothing" not in base and base == base and hash(base)
    with pytest.raises(KeyError):
        base["nothing"]


def test_identity_knows_names_shapes_and_dtypes_only(model: Path) -> None:
    same = {name: array * 2 for name, array in reversed({**FIRST, **SECOND}.items())}
    identity = Base.open(model).identity
    assert Base.open(same).identity == identity and len(identity) == 64 and int(identity, 16)
    other = [
        {**same, "lm_head.weight": same["lm_head.weight"].T},
        {**same, "lm_head.weight": same["lm_head.weight"].astype(np.float16)},
        {("x" if name == "lm_head.weight" else name): array for name, array in same.items()},
    ]
    assert identity not in {Base.open(tensors).identity for tensors in other}


def test_resolve_names_the_file(model: Path) -> None:
    base = Base.open(model)
    assert base.resolve(["a.weight", "head.weight"], optional={"head.weight"}) == {"a.weight": "model.a.weight"}
    with pytest.raises(MismatchError) as caught:
        base.resolve(["nothing.weight"])
    assert str(model) in str(caught.value)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..\\b", "link.safetensors", ""])
def test_an_index_must_not_leave_its_directory(file: str, model: Path) -> None:
    save_file(SECOND, model.parent / "secret.safetensors")
    (model / "link.safetensors").symlink_to("../secret.safetensors")
    _index(model, {"lm_head.weight": file})
    with pytest.raises(FormatError, match="outside its directory") as caught:
        Base.open(model)
    assert str(model / INDEX) in str(caught.value)


def test_links_of_a_hugging_face_cache_are_inside(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, name in enumerate((ONE, TWO, INDEX, "config.json")):
        (model / name).rename(blobs / str(i))
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    assert Base.open(snapshot).files["lm_head.weight"] == snapshot / TWO


INDICES: dict[str, tuple[Any, str]] = {
    "no map": (None, "no weight_map"),
    "empty map": ({}, "no weight_map"),
    "a number for a file": ({"lm_head.weight": 3}, "no weight_map"),
    "a missing shard": ({"lm_head.weight": "model-9.safetensors"}, "a shard is missing"),
    "a tensor that is elsewhere": ({"lm_head.weight": ONE}, "not in the file it names"),
}


@pytest.mark.parametrize("case", INDICES)
def test_wrong_indices(case: str, model: Path) -> None:
    table, told = INDICES[case]
    index = _index(model, table)
    with pytest.raises(FormatError, match=told) as caught:
        Base.open(model)
    assert str(index) in str(caught.value)


def test_tensors_that_the_index_forgot_are_not_dropped(model: Path) -> None:
    _index(model, {"model.a.weight": ONE, "lm_head.weight": TWO})
    assert set(Base.open(model)) == {*FIRST, *SECOND}


def test_a_tensor_stored_twice(model: Path) -> None:
    save_file({**SECOND, "model.a.weight": np.zeros(1)}, model / TWO)
    with pytest.raises(FormatError, match="stored twice") as caught:
        Base.open(model)
    assert ONE in str(caught.value.got) and TWO in str(caught.value.got)


def test_missing_shards_without_an_index(model: Path) -> None:
    (model / INDEX).unlink()
    (model / ONE).unlink()
    with pytest.raises(FormatError, match="1 of 2 shards are missing") as caught:
        Base.open(model)
    assert "model-00001-of-00002" in str(caught.value.got)


def test_directories_where_several_models_may_be_meant(model: Path) -> None:
    (model / INDEX).rename(model / "a.safetensors.index.json")
    (model / "b.safetensors.index.json").write_text("{}")
    with pytest.raises(FormatError, match="several models"):
        Base.open(model)
    for path in model.glob("*.index.json"):
        path.unlink()
    save_file(SECOND, model / "other-00001-of-00001.safetensors")
    with pytest.raises(FormatError, match="several models"):
        Base.open(model)


def test_a_variant_beside_the_model_is_not_taken(model: Path) -> None:
    (model / "model.fp16.safetensors.index.json").write_text("{}")
    assert set(Base.open(model)) == {*FIRST, *SECOND}


def test_a_directory_without_a_model(adapter: Path, tmp_path: Path) -> None:
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt"):
        (adapter / name).unlink()
    with pytest.raises(FormatError, match="no model weights"):
        Base.open(adapter)
    with pytest.raises(FileError, match="no such file"):
        Base.open(tmp_path / "none")


def test_pickled_models(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.save({"w": torch.ones(2)}, tmp_path / "my_model.bin")
    for name in ("training_args.bin", "optimizer.bin"):
        torch.save({"no": 1}, tmp_path / name)
    np.testing.assert_array_equal(Base.open(tmp_path)["w"], [1.0, 1.0])
