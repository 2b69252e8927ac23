"""The local Hugging Face cache, read without the hub's library and never over the network."""

from __future__ import annotations

import os
from pathlib import Path

from loratools.errors import FileError


def cached_model(model_id: str) -> Path:
    """Return the newest cached snapshot directory of ``org/name`` (or a local path, if ``model_id`` is one).

    Raises :class:`FileError` naming the download command where the cache has none.
    """
    if Path(model_id).is_dir():
        return Path(model_id)
    folder = _cache() / f"models--{model_id.replace('/', '--')}"
    reference = folder / "refs" / "main"
    named = folder / "snapshots" / reference.read_text("utf-8").strip() if reference.is_file() else None
    if named is not None and named.is_dir():
        return named
    snapshots = sorted(folder.glob("snapshots/*"), key=lambda p: p.stat().st_mtime)
    if not snapshots:
        raise FileError(
            "the base model is not in the local cache", file=folder, got=model_id, hint=f"hf download {model_id}"
        )
    return snapshots[-1]


def _cache() -> Path:
    """Return the cache directory by the hub's own environment variables."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"])
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"
    return Path(home) / "hub"
