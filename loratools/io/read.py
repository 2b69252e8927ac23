"""From a path to a bundle of lazily read tensors."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.errors import FileError
from loratools.io.bundle import Bundle
from loratools.io.directory import CONFIG, README, WEIGHTS, find_weights, siblings
from loratools.io.oserrors import os_errors
from loratools.io.safetensors import Header, peek
from loratools.io.sidecar import read_json
from loratools.io.source import mapped as mapped_leaf
from loratools.io.weights import Contents, open_index, read_file

__all__ = ["Header", "open_bundle", "peek", "read_json"]


def open_bundle(path: str | Path, *, mapped: bool = False) -> Bundle:
    """Open an adapter file or directory; headers are read and checked, tensors when used.

    The container is told by content, never by extension, but for a manifest (``.toml``), which names its weights. A
    config beside the weights is read. With ``mapped`` the tensors of a safetensors file come as read-only memory-mapped
    views. Cost: the header alone.

    Raises FileError if the path cannot be read, and FormatError (with what to do) if it holds no readable weights.
    """
    path = existing(Path(path))
    if path.suffix == ".toml" and path.is_file():
        from loratools.io.manifest import open_manifest  # few inputs are one

        return open_manifest(path)
    folder = path if path.is_dir() else path.parent
    weights = find_weights(path) if path.is_dir() else path
    contents = _open_sharded(weights) if weights.name.endswith(".index.json") else read_file(weights)
    config = _config(folder)
    bundle = Bundle(
        tensors={name: mapped_leaf(leaf) for name, leaf in contents.tensors.items()} if mapped else contents.tensors,
        metadata=contents.metadata,
        config=config,
        path=weights,
        container=contents.container,
    )
    if not path.is_dir() and config is None:
        return bundle  # a file among others: its neighbours are not known to belong to it
    readme = folder / README
    return replace(
        bundle,
        siblings=siblings(folder) if path.is_dir() or path.stem == "adapter_model" else (),
        readme=readme if readme.is_file() else None,
    )


def existing(path: Path) -> Path:
    """Return the path if something is there; else FileError with the nearest name, or with what to download."""
    with os_errors("read", path):
        if path.exists():
            return path
        raise FileError(
            "the link leads nowhere" if path.is_symlink() else "no such file or directory",
            file=path,
            hint=_download_hint(path) or _near_miss(path) or "check the path",
        )


def _download_hint(path: Path) -> str | None:
    """Say how to download what looks like ``org/name`` on the Hugging Face Hub, unless ``org`` is a local directory."""
    text = path.as_posix()
    if path.parent.exists() or text.endswith(WEIGHTS) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text):
        return None
    command = f"hf download {text} --local-dir {path.name}"
    return f"if this is a repository on the Hugging Face Hub, download it first: {command}"


def _near_miss(path: Path) -> str | None:
    from difflib import get_close_matches

    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = [name for name in get_close_matches(path.name, names, n=2) if name != path.name]
    return f"did you mean {path.parent / close[0]}?" if close else None


def _open_sharded(index: Path) -> Contents:
    shards = open_index(index)
    tensors = {name: leaf for contents in shards.values() for name, leaf in contents.tensors.items()}
    metadata = {key: value for contents in shards.values() for key, value in contents.metadata.items()}
    return Contents(tensors, metadata, next(iter(shards.values())).container)


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG
    return read_json(path) if path.is_file() else None
