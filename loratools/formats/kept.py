"""Formats that are read, not made: an adapter nobody changed is written back as it was, any other as a native file."""

from __future__ import annotations

from typing import Any

from loratools.core.adapter import Absorbed, Adapter
from loratools.core.update import Leaf
from loratools.errors import ConversionError
from loratools.formats.base import FORMATS
from loratools.formats.metadata import carried
from loratools.io.bundle import Bundle


def is_untouched(adapter: Adapter, name: str) -> bool:
    """True where an update is the one that was read: its file's own tensors say it."""
    kept = adapter.meta.absorbed.get(name)
    return kept is not None and adapter.get(name) is kept.update


def written_back(adapter: Adapter, format: str, metadata: dict[str, str]) -> Bundle:
    """Return the file's own tensors where nothing was changed, else the adapter in the native format.

    Raises :class:`ConversionError` for an adapter of another format.
    """
    if adapter.meta.source != format:
        raise ConversionError(f"adapters are read from {format} files, not written to them", hint="--to peft or native")
    if adapter.keys() != adapter.meta.absorbed.keys() or not all(is_untouched(adapter, name) for name in adapter):
        return FORMATS["native"].encode(adapter)
    tensors: dict[str, Any] = {k: t for kept in adapter.meta.absorbed.values() for k, t in kept.tensors.items()}
    said = {**carried(adapter.meta, format), **metadata}
    return Bundle({**tensors, **adapter.meta.leftover}, said, container="safetensors")


def absorbed(updates: dict[str, Any], used: dict[str, dict[str, Leaf]]) -> dict[str, Absorbed]:
    """Return what each update was made of, for writing it back."""
    return {name: Absorbed(update, used.get(name, {})) for name, update in updates.items()}
