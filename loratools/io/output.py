"""What is checked about an output before any work, and the small files that go with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from loratools.errors import FileError
from loratools.io.atomic import refuse_existing, replacing
from loratools.io.directory import CONFIG, INDEX, WEIGHTS, belongs
from loratools.io.oserrors import os_errors

_MODEL_FILES = (*WEIGHTS, INDEX, CONFIG, "config.json", ".gguf")
_CHUNK_BYTES = 1 << 24


def check_output(path: str | Path, inputs: Sequence[str | Path] = (), overwrite: bool = False) -> None:
    """Raise before any work if ``path`` cannot become an output.

    FileError if it is one of ``inputs`` by any name (link, hard link, ``./``) or a directory that holds one, whatever
    ``overwrite`` says; if its directory is missing or not writable; or if it is a directory that holds more than a
    model's files, which overwriting would delete. ExistsError if it exists and ``overwrite`` is false.
    """
    path = Path(path)
    for source in inputs:
        _refuse_input(path, Path(source))
    parent = path.parent
    with os_errors("use the output directory", parent):
        if not parent.is_dir():
            found = "a file has this name" if parent.exists() else "nothing there"
            raise FileError("no such output directory", file=parent, got=found, hint=f"mkdir -p {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise FileError("the output directory is not writable", file=parent, hint="choose another output directory")
    refuse_existing(path, overwrite=overwrite)
    with os_errors("use the output", path):
        if path.is_dir() and not path.is_symlink():
            _refuse_foreign(path)


def write_bytes(path: Path, data: bytes, *, overwrite: bool = False) -> Path:
    """Write a file, complete or not at all; return its path."""
    check_output(path, overwrite=overwrite)
    with replacing(path, overwrite=overwrite) as fd:
        write_all(fd, memoryview(data), 0, path)
    return path


def read_bytes(path: Path) -> bytes:
    """Return all bytes of a file. Raises FileError."""
    with os_errors("read the file", path):
        return path.read_bytes()


def copy_small_files(files: Iterable[Path], target: str | Path) -> tuple[Path, ...]:
    """Copy the small files of an adapter directory (tokenizer, chat template, ...) into ``target``; return the copies.

    Weights, training state, hidden files, the config, the README and files above 64 MB are left out. ExistsError if a
    name is taken.
    """
    return tuple(_copy(file, Path(target) / file.name) for file in files if belongs(file))


def _refuse_input(path: Path, source: Path) -> None:
    with os_errors("compare the output with the input", path):
        if not path.exists() or not source.exists():
            return
        same = path.samefile(source)
        inside = path.is_dir() and source.resolve().is_relative_to(path.resolve())
    if same or inside:
        what = "the output is the input itself" if same else "the output directory holds the input"
        raise FileError(
            what, file=path, got=f"input {source}", hint="inputs are never overwritten: choose another output"
        )


def _refuse_foreign(folder: Path) -> None:
    """Overwriting a directory deletes what is in it: only a model's own directory (or an empty one) may be."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise FileError(
            "the output directory is the current one, or holds it", file=folder, hint="choose another output"
        )
    with os_errors("read the output directory", folder), os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    folders = [name for name, is_folder in found if is_folder]
    if found and (folders or not any(name.endswith(_MODEL_FILES) for name, _ in found)):
        raise FileError(
            "the output directory holds more than a model, and overwriting would delete it",
            file=folder,
            got=", ".join(folders[:3] or [name for name, _ in found[:3]]),
            hint="choose another output, or delete the directory yourself",
        )


def _copy(source: Path, target: Path) -> Path:
    with os_errors("read the file", source), source.open("rb") as file, replacing(target, overwrite=False) as fd:
        while chunk := file.read(_CHUNK_BYTES):
            write_all(fd, memoryview(chunk), os.lseek(fd, 0, os.SEEK_END), target)
    return target


def write_all(fd: int, data: memoryview, offset: int, target: Path) -> None:
    """Write every byte at ``offset``; FileError naming the target if the system refuses."""
    with os_errors("write the output", target):
        while data:
            count = os.pwrite(fd, data, offset)
            data, offset = data[count:], offset + count
