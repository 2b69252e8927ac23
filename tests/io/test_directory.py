from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loratools.errors import FileError, FormatError, UnsupportedError
from loratools.io import directory
from loratools.io.read import open_bundle


def _put(folder: Path, *names: str) -> None:
    """Write small safetensors files; each holds one tensor named like the file."""
    folder.mkdir(exist_ok=True)
    for name in names:
        save_file({name: np.zeros(1, np.float32)}, folder / name)


def test_peft_directory(adapter: Path) -> None:
    bundle = open_bundle(adapter)
    assert bundle.path == adapter / "adapter_model.safetensors"
    assert bundle.container == "safetensors"
    assert bundle.config == {"peft_type": "LORA", "r": 3}
    assert bundle.metadata == {"format": "pt"}
    assert bundle.readme == adapter / "README.md"
    assert list(bundle.tensors) == ["m.q.lora_A.weight", "m.q.lora_B.weight"]


def test_siblings_are_small_files_without_weights_and_training_state(adapter: Path, monkeypatch: Any) -> None:
    assert [path.name for path in open_bundle(adapter).siblings] == ["chat_template.jinja", "tokenizer.json"]
    monkeypatch.setattr(directory, "_LIMIT_BYTES", 5)
    assert [path.name for path in open_bundle(str(adapter)).siblings] == ["tokenizer.json"]


def test_a_file_beside_its_config(adapter: Path) -> None:
    bundle = open_bundle(adapter / "adapter_model.safetensors")
    assert bundle.config == {"peft_type": "LORA", "r": 3}
    assert bundle.readme == adapter / "README.md"
    assert bundle.siblings == open_bundle(adapter).siblings  # the weights of a directory stand for the directory
    assert bundle.siblings


def test_a_file_alone_has_no_config_and_no_neighbours(tmp_path: Path) -> None:
    _put(tmp_path, "one.safetensors", "two.safetensors")
    (tmp_path / "README.md").write_text("of something else")
    bundle = open_bundle(tmp_path / "one.safetensors")
    assert (bundle.config, bundle.readme, bundle.siblings) == (None, None, ())


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("adapter_model.safetensors", "adapter_model.bin", "other.safetensors"), "adapter_model.safetensors"),
        (("adapter_model.bin", "adapter_model.pt"), "adapter_model.bin"),
        (("adapters.safetensors", "0000100_adapters.safetensors"), "adapters.safetensors"),
        (("adapters.npz",), "adapters.npz"),
        (("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"), "pytorch_lora_weights.safetensors"),
        (("0000100_adapters.safetensors",), "0000100_adapters.safetensors"),
        (("some.safetensors", "some.pt"), "some.safetensors"),
        (("lit_model.pth.lora",), "lit_model.pth.lora"),
        (("my.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"), "my.bin"),
        (("._adapter_model.safetensors", "my.pt"), "my.pt"),
    ],
)
def test_which_file_of_a_directory_is_taken(names: tuple[str, ...], chosen: str, tmp_path: Path) -> None:
    _put(tmp_path, *names)
    assert list(open_bundle(tmp_path).tensors) == [chosen]


@pytest.mark.parametrize(
    "names", [("a.safetensors", "b.safetensors"), ("a.pt", "b.bin"), ("adapter_model.safetensors", "adapters.npz")]
)
def test_several_candidates_are_listed(names: tuple[str, str], tmp_path: Path) -> None:
    _put(tmp_path, *names)
    _put(tmp_path / "inner", "adapter_model.safetensors")
    with pytest.raises(FormatError, match="several weights files") as caught:
        open_bundle(tmp_path)
    assert all(name in str(caught.value.got) for name in names)
    assert "inner/" in (caught.value.hint or "")


def test_adapters_in_sub_directories_are_named(tmp_path: Path) -> None:
    _put(tmp_path / "default", "adapter_model.safetensors")
    _put(tmp_path / "empty")
    with pytest.raises(FormatError, match="no weights file") as caught:
        open_bundle(tmp_path)
    assert "default/" in (caught.value.hint or "") and "empty" not in (caught.value.hint or "")


def test_a_distributed_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match="distributed checkpoint"):
        open_bundle(tmp_path)


def test_a_sharded_adapter(tmp_path: Path) -> None:
    _put(tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    names = sorted(path.name for path in tmp_path.iterdir())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: name for name in names}}))
    bundle = open_bundle(tmp_path)
    assert list(bundle.tensors) == names and bundle.path == index and bundle.container == "safetensors"
    assert open_bundle(index).path == index


def test_missing_path_has_the_nearest_name(adapter: Path) -> None:
    with pytest.raises(FileError, match="no such file") as caught:
        open_bundle(adapter / "adapter_modle.safetensors")
    assert "adapter_model.safetensors?" in (caught.value.hint or "")


def test_a_hub_id_is_answered_with_what_to_download(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError) as caught:
        open_bundle("some-org/My_Adapter-v1.0")
    assert "hf download some-org/My_Adapter-v1.0" in (caught.value.hint or "")
    for local in ("some-org/adapter_model.safetensors", "/some/where", "a/b/c", "name"):
        with pytest.raises(FileError) as caught:
            open_bundle(local)
        assert "hf download" not in (caught.value.hint or "")
    (tmp_path / "org").mkdir()
    with pytest.raises(FileError) as caught:
        open_bundle("org/name")
    assert "hf download" not in (caught.value.hint or "")


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(FileError, match="link leads nowhere"):
        open_bundle(tmp_path / "a.safetensors")


@pytest.mark.usefixtures("permissions_bind")
def test_unreadable_directory(adapter: Path) -> None:
    adapter.chmod(0)
    try:
        with pytest.raises(FileError):
            open_bundle(adapter)
    finally:
        adapter.chmod(0o755)
