"""Many inputs at once: files, adapter directories, directories of adapters, and patterns that no shell expanded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loratools.io.directory import WEIGHTS, file_names

_OTHERS = (*WEIGHTS, ".gguf")


def gathered(words: Iterable[str]) -> list[Path]:
    """Return the adapters that the words name, each once, in order.

    A directory without weights stands for the adapters inside it; a word with ``*``, ``?`` or ``[`` that is no path
    itself is a pattern. A word that names nothing is returned as it is: opening it says what is wrong.
    """
    return list(dict.fromkeys(path for word in words for path in _of(word)))


def _of(word: str) -> list[Path]:
    from glob import glob, has_magic

    path = Path(word)
    if not path.exists() and has_magic(word):
        found = [Path(p) for p in sorted(glob(word, recursive=True))]  # noqa: PTH207
        return [inside for p in found if p.is_dir() or _is_weights(p) for inside in _inside(p)] or [path]
    return _inside(path)


def _inside(path: Path) -> list[Path]:
    """Return the path itself, or the adapter directories below it if it holds no weights."""
    if not path.is_dir() or any(name.endswith(_OTHERS) for name in file_names(path)):
        return [path]
    below = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    found = [inside for p in below for inside in _inside(p) if inside.is_dir() and _holds(inside)]
    return found or [path]


def _holds(folder: Path) -> bool:
    return any(name.endswith(_OTHERS) for name in file_names(folder))


def _is_weights(path: Path) -> bool:
    return path.name.endswith(_OTHERS)
