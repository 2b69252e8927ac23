"""One file, read at offsets by any number of threads through one descriptor."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from loratools.errors import FileError, UsageError
from loratools.io.dtypes import numpy_dtype
from loratools.io.oserrors import file_error, os_errors
from loratools.leaf import Array, Leaf

Signature = tuple[int, int, int]
_CHANGED = "do not change inputs while they are being read; run again"


def signature(stat: os.stat_result) -> Signature:
    """Return what tells a file from its successor: inode, size, time of change."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class Source:
    """A file opened on first use and closed with its last leaf.

    ``read_into`` is thread-safe (``preadv`` has no shared position). FileError if the file is no longer the one whose
    header was read.
    """

    def __init__(self, path: Path, seen: Signature) -> None:
        self.path, self._seen = path, seen
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._map: np.ndarray[Any, Any] | None = None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``."""
        fd = self._fd if self._fd is not None else self._open()
        done, size = 0, len(buffer)
        while done < size:
            try:
                count = _pread_into(fd, buffer[done:], offset + done)
            except OSError as error:
                raise file_error("read the file", self.path, error) from error
            if not count:
                raise FileError("the file became shorter since it was opened", file=self.path, hint=_CHANGED)
            done += count

    def mapped(self) -> np.ndarray[Any, Any]:
        """Return the whole file as a read-only memory-mapped uint8 array, shared by all callers."""
        fd = self._fd if self._fd is not None else self._open()
        with self._lock, os_errors("map the file", self.path):
            if self._map is None:
                self._map = np.frombuffer(mmap.mmap(fd, 0, access=mmap.ACCESS_READ), np.uint8)
        return self._map

    def _open(self) -> int:
        with self._lock, os_errors("read the file", self.path):
            if self._fd is None:
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                if signature(os.fstat(fd)) != self._seen:
                    os.close(fd)
                    raise FileError("the file changed since it was opened", file=self.path, hint=_CHANGED)
                weakref.finalize(self, os.close, fd)
                self._fd = fd
        return self._fd


def _pread_into(fd: int, view: memoryview, offset: int) -> int:
    """Read once into ``view``, without a copy where the system has preadv(2); return the number of bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    data = os.pread(fd, len(view), offset)
    view[: len(data)] = data
    return len(data)


class Stored:
    """Where a tensor lies in a :class:`Source`; calling it reads (it is the ``load`` of a Leaf)."""

    __slots__ = ("dtype", "nbytes", "shape", "source", "start")

    def __init__(self, source: Source, start: int, nbytes: int, dtype: str, shape: tuple[int, ...]) -> None:
        self.source, self.start, self.nbytes, self.dtype, self.shape = source, start, nbytes, dtype, shape

    def __call__(self, out: Array | None = None) -> Array:
        """Read into a fresh array, or into the uint8 scratch buffer ``out`` and return a view of that."""
        buffer = np.empty(self.nbytes, np.uint8) if out is None else scratch(out, self.nbytes)
        self.source.read_into(writable(buffer), self.start)
        return buffer.view(numpy_dtype(self.dtype)).reshape(self.shape)

    def rows(self, start: int, stop: int) -> Stored:
        """Return where rows start .. stop of the first axis lie."""
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        return Stored(
            self.source, self.start + start * row, (stop - start) * row, self.dtype, (stop - start, *self.shape[1:])
        )

    def mapped(self, out: Array | None = None) -> Array:
        """Return a read-only view of the mapped file; ``out`` is not used."""
        raw = self.source.mapped()[self.start : self.start + self.nbytes]
        if raw.size < self.nbytes:
            raise FileError("the file became shorter since it was opened", file=self.source.path, hint=_CHANGED)
        return raw.view(numpy_dtype(self.dtype)).reshape(self.shape)


def writable(buffer: np.ndarray[Any, Any]) -> memoryview:
    """Return the memory of a uint8 array."""
    return buffer.data


def scratch(out: Array, nbytes: int) -> np.ndarray[Any, Any]:
    """Return the first ``nbytes`` of a caller's buffer; UsageError unless it is contiguous uint8 and long enough."""
    if out.dtype != np.uint8 or not out.flags.c_contiguous or out.size < nbytes:
        raise UsageError(
            "a scratch buffer does not fit",
            expected=f"a contiguous uint8 array of at least {nbytes} bytes",
            got=f"{out.dtype} array of {out.nbytes} bytes",
        )
    return np.asarray(out).reshape(-1)[:nbytes]


def mapped(leaf: Leaf) -> Leaf:
    """Return a leaf that reads as a read-only memory-mapped view, if it lies in a file as it is; else the same leaf.

    The pages are shared and cost nothing until touched; should another program cut the file short meanwhile, touching
    them ends the process (SIGBUS), as with any memory map.
    """
    return Leaf(leaf.shape, leaf.dtype, leaf.load.mapped) if isinstance(leaf.load, Stored) else leaf
