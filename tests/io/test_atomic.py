from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import ExistsError, FileError
from loratools.io import atomic
from loratools.io.write import write_directory, write_text

PROLOGUE = """
import os, signal, shutil, sys
from pathlib import Path
import numpy as np
from loratools.io import atomic
from loratools.io.write import TensorPlan, write_directory, write_safetensors, write_text
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
target = Path(sys.argv[1])
"""
KILLED_FILE = {
    "between tensors": """
def chunks():
    yield "a", np.ones(100_000, np.float32)
    die()
write_safetensors(target, [TensorPlan("a", "float32", (100_000,)), TensorPlan("b", "float32", (1,))], chunks(),
                  overwrite=True)
""",
    "before the rename": "os.replace = die; write_text(target, 'new', overwrite=True)",
    "while forcing it to the disk": "os.fsync = die; write_text(target, 'new', overwrite=True)",
}
FILL = """
def fill(folder):
    write_text(folder / "adapter_config.json", "new")
    write_text(folder / "more.json", "new")
"""
KILLED_DIRECTORY = {
    "while it is filled": "write_directory(target, lambda d: (fill(d), die()), overwrite=True)",
    "before the exchange": "atomic._exchange = die; write_directory(target, fill, overwrite=True)",
    "before the old one is removed": "shutil.rmtree = die; write_directory(target, fill, overwrite=True)",
}


def _run_killed(body: str, target: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROLOGUE + body, str(target)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def _hidden(folder: Path) -> bool:
    """True if everything but the target is a hidden temporary name."""
    others = [path.name for path in folder.iterdir() if path.name != "out"]
    return all(name.startswith(".") and name.endswith(".tmp") for name in others)


@pytest.mark.parametrize("moment", KILLED_FILE)
@pytest.mark.parametrize("old", [None, "old"])
def test_a_kill_leaves_the_old_file_or_none(moment: str, old: str | None, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if old is not None:
        target.write_text(old)
    _run_killed(KILLED_FILE[moment], target)
    assert (target.read_text() if target.exists() else None) == old
    assert _hidden(tmp_path)


@pytest.mark.parametrize("moment", KILLED_DIRECTORY)
def test_a_kill_leaves_a_whole_directory(moment: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "adapter_config.json").write_text("old")
    _run_killed(FILL + KILLED_DIRECTORY[moment], target)
    found = {path.name: path.read_text() for path in target.iterdir()}
    old, new = {"adapter_config.json": "old"}, {"adapter_config.json": "new", "more.json": "new"}
    assert found == (new if "removed" in moment else old)
    assert _hidden(tmp_path)


def _fill(folder: Path) -> None:
    write_text(folder / "adapter_config.json", "new")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_directories_appear_and_are_replaced(can_exchange: bool, tmp_path: Path, monkeypatch: Any) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    target = tmp_path / "out"
    assert write_directory(target, _fill) == target
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (target / "tokenizer.json").write_text("old")
    with pytest.raises(ExistsError):
        write_directory(target, _fill)
    write_directory(str(target), _fill, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["adapter_config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_the_exchange_happens_on_linux(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    (one / "x").touch()
    assert atomic._exchange(one, two) and (two / "x").exists()
    assert not atomic._exchange(one, tmp_path / "missing")


def test_a_failed_rename_brings_the_old_directory_back(tmp_path: Path, monkeypatch: Any) -> None:
    target = tmp_path / "out"
    write_directory(target, _fill)
    (target / "adapter_config.json").write_text("old")
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if to == target and real is not None and (self / "adapter_config.json").read_text() == "new":
            raise OSError(5, "Input/output error")
        return real(self, to)

    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(FileError, match="Input/output"):
        write_directory(target, _fill, overwrite=True)
    assert (target / "adapter_config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_filling_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        _fill(folder)
        raise error("mine")

    with pytest.raises(error, match="mine"):
        write_directory(tmp_path / "out", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with pytest.raises(FileError, match="to be a directory"):
        write_directory(tmp_path / "out", _fill, overwrite=True)
    assert (tmp_path / "out").read_text() == "old"


def test_an_old_directory_that_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    import shutil

    target = tmp_path / "out"
    write_directory(target, _fill)
    (target / "adapter_config.json").write_text("old")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(FileError, match="new output is in place") as caught:
        write_directory(target, _fill, overwrite=True)
    assert (target / "adapter_config.json").read_text() == "new" and ".tmp" in (caught.value.hint or "")


def test_directories_without_fsync(tmp_path: Path, monkeypatch: Any) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.fstat(fd).st_mode & 0o40000:
            raise OSError(22, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert write_text(tmp_path / "x", "y").read_text() == "y"
