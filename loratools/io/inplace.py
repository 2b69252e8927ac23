"""Few elements of large files, read and written where they lie: only the pages that hold them are touched."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from loratools.errors import FileError, UnsupportedError
from loratools.io.atomic import sync
from loratools.io.base import Base
from loratools.io.dtypes import numpy_dtype
from loratools.io.oserrors import os_errors
from loratools.io.source import Stored
from loratools.leaf import Array


class InPlace:
    """The parameters of a model's safetensors files, mapped for reading and, with ``writable``, for writing.

    Raises UnsupportedError for tensors in other containers or in memory, and FileError for files that are links (into
    a cache that others share) or not writable.
    """

    def __init__(self, model: Base, names: list[str], *, writable: bool) -> None:
        self._stored: dict[str, tuple[Path, Stored]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for name in names:
            load = model.leaf(name).load
            path = model.files.get(name)
            if not isinstance(load, Stored) or path is None or path.suffix != ".safetensors":
                raise UnsupportedError(
                    "a model is switched in place in its safetensors files", parameter=name, got=path or "in memory"
                )
            self._stored[name] = path, load
        for path in dict.fromkeys(path for path, _ in self._stored.values()):
            self._maps[path] = _mapped(path, writable)

    def read(self, name: str, flat: Array) -> Array:
        """Return the elements at row-major positions of a parameter, in its storage dtype."""
        view = self._view(name)
        return _as_bits(view)[flat].view(view.dtype)

    def write(self, name: str, flat: Array, values: Array) -> None:
        """Write elements at row-major positions; they reach the disk with :meth:`flush` at the latest."""
        view = self._view(name)
        if view.dtype != values.dtype:
            raise UnsupportedError("elements of another dtype", parameter=name, expected=view.dtype, got=values.dtype)
        _as_bits(view)[flat] = _as_bits(values)

    def flush(self) -> None:
        """Force everything written to the disk."""
        for path, mapped in self._maps.items():
            with os_errors("write the model", path):
                mapped.flush()
            sync(path)

    def _view(self, name: str) -> np.ndarray[Any, Any]:
        path, stored = self._stored[name]
        dtype = numpy_dtype(stored.dtype)
        return np.frombuffer(self._maps[path], dtype, stored.nbytes // dtype.itemsize, stored.start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._maps.clear()  # closed with their last view


def _as_bits(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a view as unsigned integers: NumPy gathers and scatters its own types faster than bfloat16."""
    return x.view(f"u{x.dtype.itemsize}")


def _mapped(path: Path, writable: bool) -> mmap.mmap:
    if path.is_symlink():
        raise FileError(
            "the model's file is a link: what it leads to may be shared",
            file=path,
            hint="switch a copy of the model (cp -L)",
        )
    with os_errors("open the model for writing" if writable else "read the model", path):
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            return mmap.mmap(fd, 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        finally:
            os.close(fd)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file while the block runs, in a directory made for it; FileError if another process holds it.

    Whoever holds the lock may remove both, the lock last: a lock that was removed while one waited for it is none.
    """
    while (fd := _lock(path)) is None:
        pass
    try:
        yield
    finally:
        os.close(fd)


def _lock(path: Path) -> int | None:
    """Return the descriptor of the locked file, or None where it was removed meanwhile."""
    with os_errors("create a directory beside the model", path.parent):
        path.parent.mkdir(exist_ok=True)
        sync(path.parent.parent)
    with os_errors("lock", path):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # the directory went again
            return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise FileError("another switch of this model is running", file=path, hint="wait for it") from error
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(fd), path.stat()):
            return fd
    os.close(fd)
    return None
