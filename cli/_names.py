"""Default names of outputs: ``in.safetensors`` -> ``in-r8.safetensors``, a PEFT directory ``NAME/`` -> ``NAME-r8/``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from loratools.core.adapter import Adapter

_DIRECTORIES = ("peft", "mlx")
_SUFFIX = {"gguf": ".gguf"}


def default_output(path: Path, adapter: Adapter, suffix: str) -> Path:
    """Return the output beside the input. Formats with a config become directories, even from a bare weights file."""
    source = Path(os.path.normpath(path.absolute()))  # links are not followed: the output lies beside the name given
    return placed(source, adapter.meta.format, suffix)


def placed(source: Path, format: str, suffix: str) -> Path:
    """Return ``NAME-suffix`` beside a file or directory: a directory where the format has a config, else a file."""
    inside = not source.is_dir() and source.stem in ("adapter_model", "adapters")  # its directory bears the name
    folder = source.parent if inside else source
    name = folder.name if inside or source.is_dir() else source.stem
    return folder.with_name(f"{name}-{suffix}{'' if format in _DIRECTORIES else _SUFFIX.get(format, '.safetensors')}")


def written_as(adapter: Adapter, format: str) -> Adapter:
    """Return the adapter as one of the format that it will be written in: what its target may be depends on that."""
    return replace(adapter, meta=replace(adapter.meta, format=format))
