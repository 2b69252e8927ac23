from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from loratools.errors import ExistsError, FileError
from loratools.io.write import TensorPlan, check_output, copy_small_files, write_directory, write_safetensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    path.write_bytes(b"precious")
    return path


@pytest.mark.parametrize("alias", ["itself", "dot", "relative", "symlink", "hardlink", "linked directory"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_the_input_is_never_the_output(
    alias: str, overwrite: bool, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    link = source.parent / "link"
    target: Path | str = source
    if alias == "dot":
        target = "./in.safetensors"
    elif alias == "relative":
        target = f"../{source.parent.name}/in.safetensors"
    elif alias == "symlink":
        link.symlink_to(source)
        target = link
    elif alias == "hardlink":
        link.hardlink_to(source)
        target = link
    elif alias == "linked directory":
        link.symlink_to(source.parent)
        target = link / "in.safetensors"
    plan = [TensorPlan("a", "float32", (1,))]
    with pytest.raises(FileError, match="the output is the input itself") as caught:
        write_safetensors(target, plan, [("a", np.ones(1, np.float32))], overwrite=overwrite, inputs=[source])
    assert "choose another output" in (caught.value.hint or "")
    assert source.read_bytes() == b"precious"


def test_a_directory_that_holds_the_input_is_never_replaced(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    with pytest.raises(FileError, match="holds the input"):
        write_directory(adapter, lambda _: pytest.fail("work began"), overwrite=True, inputs=[weights])
    with pytest.raises(FileError, match="holds the input"):
        check_output(adapter.parent, [adapter], True)
    with pytest.raises(FileError, match="the input itself"):
        check_output(adapter, [adapter], True)
    assert weights.exists()


def test_missing_parent_and_parents_that_are_files(source: Path) -> None:
    with pytest.raises(FileError, match="no such output directory") as caught:
        check_output(source.parent / "no" / "out")
    assert "mkdir -p" in (caught.value.hint or "")
    with pytest.raises(FileError, match="a file has this name"):
        check_output(source / "out")


def test_a_read_only_directory(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FileError, match="not writable"):
        check_output(source.parent / "out")


@pytest.mark.usefixtures("permissions_bind")
def test_a_read_only_directory_for_real(tmp_path: Path) -> None:
    folder = tmp_path / "fixed"
    folder.mkdir(0o555)
    with pytest.raises(FileError, match="not writable"):
        check_output(folder / "out")


def test_existing_outputs(source: Path, adapter: Path) -> None:
    for path in (source, adapter):
        with pytest.raises(ExistsError, match="exists already") as caught:
            check_output(path)
        assert "--overwrite" in (caught.value.hint or "")
    check_output(source, (), True)
    (source.parent / "dangling").symlink_to("nowhere")
    with pytest.raises(ExistsError):
        check_output(source.parent / "dangling")


def test_only_directories_of_models_may_be_replaced(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileError, match="checkpoint-5"):
        check_output(adapter, (), True)
    (adapter / "checkpoint-5").rmdir()
    check_output(adapter, (), True)
    letters = adapter.parent / "letters"
    letters.mkdir()
    check_output(letters, (), True)
    (letters / "to_mother.txt").write_text("dear")
    with pytest.raises(FileError, match=r"to_mother\.txt"):
        check_output(letters, (), True)
    monkeypatch.chdir(adapter)
    with pytest.raises(FileError, match="the current one"):
        check_output(adapter, (), True)


def test_small_files_are_copied_and_nothing_else(adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    files = [path for path in sorted(adapter.iterdir()) if path.is_file()]
    copies = copy_small_files(files, target)
    assert [path.name for path in copies] == ["chat_template.jinja", "tokenizer.json"]
    assert sorted(path.name for path in target.iterdir()) == ["chat_template.jinja", "tokenizer.json"]
    assert (target / "chat_template.jinja").read_text() == "{{ x }}"
    with pytest.raises(ExistsError):
        copy_small_files(files, target)


def test_copies_of_several_pieces(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratools.io import output

    monkeypatch.setattr(output, "_CHUNK_BYTES", 3)
    (adapter / "vocab.txt").write_bytes(bytes(range(256)))
    (copy,) = copy_small_files([adapter / "vocab.txt"], tmp_path)
    assert copy.read_bytes() == bytes(range(256))
    with pytest.raises(FileError, match=r"gone\.txt"):
        copy_small_files([adapter / "gone.txt"], tmp_path)
