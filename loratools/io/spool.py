"""Results that wait on the disk: arrays beyond a limit go to an unnamed temporary file and come back as leaves."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import IO

import numpy as np

from loratools.errors import FileError
from loratools.io.dtypes import as_bytes, dtype_name, numpy_dtype, to_numpy
from loratools.io.oserrors import os_errors
from loratools.io.output import write_all
from loratools.leaf import Array, Leaf

LIMIT_BYTES = 32 << 20


class Spool:
    """Keeps arrays: the first ``limit_bytes`` in memory, the rest in a file that vanishes with its last leaf.

    The file lies in the system's temporary directory (``TMPDIR``). Safe for threads. Arrays on a GPU stay there.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._room = limit_bytes
        self._end = 0
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()

    def keep(self, x: Array) -> Leaf | Array:
        """Return the array itself while there is room, else the handle that reads it back."""
        if getattr(getattr(x, "device", "cpu"), "type", "cpu") != "cpu":
            return x
        size = int(x.nbytes)
        with self._lock:
            if size <= self._room:
                self._room -= size
                return x
            start, self._end = self._end, self._end + size
            file = self._opened()
        with os_errors("write to the temporary directory", Path(tempfile.gettempdir())):
            write_all(file.fileno(), as_bytes(to_numpy(x)), start, Path(tempfile.gettempdir()))
        return _leaf(file, start, size, dtype_name(x), tuple(int(n) for n in x.shape))

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            with os_errors("create a file in the temporary directory", Path(tempfile.gettempdir())):
                self._file = tempfile.TemporaryFile(prefix="loratools-")  # noqa: SIM115 - lives as long as its leaves
        return self._file


def _leaf(file: IO[bytes], start: int, size: int, dtype: str, shape: tuple[int, ...]) -> Leaf:
    def load(out: Array | None) -> Array:
        buffer = np.empty(size, np.uint8)
        done = 0
        while done < size:  # one read returns at most 2 GiB
            data = os.pread(file.fileno(), size - done, start + done)
            if not data:
                raise FileError("the temporary file became shorter", got=f"{done} of {size} bytes")
            buffer[done : done + len(data)] = np.frombuffer(data, np.uint8)
            done += len(data)
        return buffer.view(numpy_dtype(dtype)).reshape(shape)

    return Leaf(shape, dtype, load)
