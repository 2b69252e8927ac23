"""A manifest: a TOML file that says which weights belong to it, and what they mean.

``weights`` (a file name or several) and ``files`` (name -> JSON file) lie beside it. The text travels with the tensors
as metadata, so that one safetensors file may hold both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loratools.errors import FormatError
from loratools.io.bundle import Bundle
from loratools.io.oserrors import os_errors
from loratools.io.sidecar import LIMIT_BYTES, read_json
from loratools.io.weights import open_shards

SUFFIX = ".toml"
KEY, FILES = "loratools.manifest", "loratools.manifest.files"


def open_manifest(path: Path) -> Bundle:
    """Return the tensors that a manifest names, with its text and its JSON files among the metadata.

    Raises FormatError for invalid TOML, for a file outside the manifest's directory, and for a tensor stored twice.
    """
    text = _text(path)
    said = parse_manifest(text, path)
    named = said.get("weights")
    files = [named] if isinstance(named, str) else named
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise FormatError("the manifest names no weights", file=path, expected='weights = "FILE"', got=repr(named)[:80])
    shards = open_shards((_beside(path, file) for file in files), path)
    sides = {name: read_json(_beside(path, file)) for name, file in _table(said, "files", path).items()}
    metadata = {key: value for contents in shards.values() for key, value in contents.metadata.items()}
    metadata |= {KEY: text} | ({FILES: json.dumps(sides)} if sides else {})
    tensors = {name: leaf for contents in shards.values() for name, leaf in contents.tensors.items()}
    return Bundle(tensors, metadata, None, path, next(iter(shards.values())).container)


def parse_manifest(text: str, path: Path | None = None) -> dict[str, Any]:
    """Return the object that a manifest's text holds; :class:`FormatError` with the position where it is no TOML."""
    import tomllib  # few inputs are a manifest

    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError("the manifest is no valid TOML", file=path, got=str(error)) from None


def _text(path: Path) -> str:
    with os_errors("read the file", path):
        raw = path.read_bytes()
    if len(raw) > LIMIT_BYTES:
        raise FormatError("the manifest is too large", file=path, expected=f"at most {LIMIT_BYTES} bytes", got=len(raw))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError("the manifest is no valid TOML", file=path, got=str(error)) from None


def _table(said: dict[str, Any], name: str, path: Path) -> dict[str, str]:
    value = said.get(name, {})
    if not isinstance(value, dict) or not all(isinstance(file, str) for file in value.values()):
        raise FormatError(f"{name} is no table of file names", file=path, expected='{name = "FILE.json"}', got=value)
    return value


def _beside(manifest: Path, file: str) -> Path:
    """Return a file in the manifest's own directory or below it."""
    if not file or Path(file).is_absolute() or ".." in Path(file).parts or "\\" in file or "\0" in file:
        raise FormatError(
            "the manifest names a file outside its directory", file=manifest, expected="plain file names", got=file
        )
    target = manifest.parent / file
    if not target.is_file():
        raise FormatError("a file of the manifest is missing", file=manifest, expected=file)
    return target
