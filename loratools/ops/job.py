"""What tells one job from another: inputs by content, and every option that changes the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from loratools.core.adapter import Adapter
from loratools.core.update import Update, is_tensor, tensors
from loratools.io.base import Base
from loratools.linalg.namespace import dtype_name, raw_bytes
from loratools.version import VERSION


def fingerprint(base: Base, adapters: Sequence[Adapter], **options: Any) -> dict[str, Any]:
    """Return what must be equal for two runs to write the same bytes.

    The base counts by its headers, sizes and times of change (hashing it would cost as much as merging), adapters by
    the sha256 of their tensors and settings.
    """
    files = {file.name: _stamp(file) for file in dict.fromkeys(base.files.values())}
    return {
        "loratools": VERSION,
        "base": {"identity": base.identity, "files": files},
        "adapters": [content_hash(adapter) for adapter in adapters],
        **options,
    }


def content_hash(adapter: Adapter) -> str:
    """Return the sha256 (hex) of an adapter's names, kinds, numbers and tensors, wherever it is stored."""
    digest = hashlib.sha256()
    for name, update in adapter.items():
        digest.update(f"{name}\t{json.dumps(_described(update))}\n".encode())
        for _, tensor in tensors(update):
            digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def _described(value: Any) -> Any:
    """Return kinds, numbers, shapes and dtypes of an update, the kinds inside it included."""
    if isinstance(value, Update):
        return [value.kind, *((f.name, _described(getattr(value, f.name))) for f in fields(value))]  # type: ignore[arg-type]
    if is_tensor(value):
        return [dtype_name(value), list(value.shape)]
    return [_described(v) for v in value] if isinstance(value, tuple) else value


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]
