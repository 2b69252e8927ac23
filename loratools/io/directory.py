"""Adapter directories: which file holds the weights, and which small files belong to it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from loratools.errors import FormatError, UnsupportedError
from loratools.io.oserrors import os_errors

CONFIG = "adapter_config.json"
README = "README.md"
INDEX = ".safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".lora")
_OTHER_WEIGHTS = (".gguf", ".h5", ".msgpack", ".onnx", ".onnx_adapter", ".distcp", ".pkl", INDEX, ".bin.index.json")
STATE = ("optimizer", "scheduler", "rng_state", "scaler.", "training_args.", "trainer_state.")
_LIMIT_BYTES = 64 << 20

FAMILIES = (
    ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt"),  # PEFT, in its own order of preference
    ("adapters.safetensors", "adapters.npz"),  # MLX
    ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),  # diffusers
)
_KNOWN = frozenset(name for family in FAMILIES for name in family)


def find_weights(folder: Path) -> Path:
    """Return the weights file (or the index of its shards) of an adapter directory.

    The file names of PEFT, MLX and diffusers come first, then an index of shards, then the only safetensors file, then
    the only weights file of another kind. FormatError when there is none or more than one; it lists what there is,
    and the sub-directories that hold adapters.
    """
    names = file_names(folder)
    found = [next(name for name in family if name in names) for family in FAMILIES if names & set(family)]
    for candidates in (found, _ending(names, (INDEX,)), _ending(names, (".safetensors",)), _ending(names, WEIGHTS)):
        if len(candidates) == 1:
            return folder / candidates[0]
        if candidates:
            raise _ambiguous(folder, candidates)
    raise _nothing(folder)


def file_names(folder: Path) -> set[str]:
    """Return the names of the visible regular files (links followed) in a directory."""
    with os_errors("read the directory", folder), os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")}


def siblings(folder: Path) -> tuple[Path, ...]:
    """Return the small files of an adapter directory that belong in a copy of it, sorted: tokenizer, template, ...."""
    return tuple(folder / name for name in sorted(file_names(folder)) if belongs(folder / name))


def belongs(path: Path) -> bool:
    """True for a file to be copied along: no weights, no training state, not hidden, not above 64 MB.

    The adapter config and the README are not among them: they are written anew.
    """
    name = path.name
    if name in (CONFIG, README) or name.startswith((".", *STATE)) or name.endswith((*WEIGHTS, *_OTHER_WEIGHTS)):
        return False
    with os_errors("read the file", path):
        return path.stat().st_size <= _LIMIT_BYTES


def _ending(names: Iterable[str], suffixes: tuple[str, ...]) -> list[str]:
    return sorted(name for name in names if name.endswith(suffixes) and not name.startswith(STATE))


def _ambiguous(folder: Path, candidates: list[str]) -> FormatError:
    return FormatError(
        "the directory holds several weights files",
        file=folder,
        expected="one adapter",
        got=_listed(candidates),
        hint=f"name the one you mean, e.g. {folder / candidates[0]}{_nested_hint(folder)}",
    )


def _nothing(folder: Path) -> FormatError:
    if any(folder.glob("*.distcp")):
        return UnsupportedError(
            "this is a distributed checkpoint", file=folder, hint="export it with the framework that wrote it first"
        )
    inner = nested(folder)
    hint = f"adapters are in {_listed(inner)}: give one of these" if inner else "check the path"
    return FormatError(
        "no weights file in the directory", file=folder, expected="adapter_model.safetensors or the like", hint=hint
    )


def _nested_hint(folder: Path) -> str:
    inner = nested(folder)
    return f"; there are adapters in {_listed(inner)}, too" if inner else ""


def nested(folder: Path) -> list[str]:
    """Return the sub-directories that hold files named like an adapter's."""
    with os_errors("read the directory", folder), os.scandir(folder) as entries:
        inner = [Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(f"{path.name}/" for path in inner if any((path / name).is_file() for name in _KNOWN))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
