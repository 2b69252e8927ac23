"""The .npz container of NumPy and MLX, read member by member and without pickles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

from loratools.errors import FormatError
from loratools.io.dtypes import CODES, numpy_dtype
from loratools.io.oserrors import os_errors
from loratools.io.source import scratch, writable
from loratools.io.zips import damage, open_zip
from loratools.leaf import Array, Leaf

if TYPE_CHECKING:
    from zipfile import ZipFile

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_HEADER_LIMIT = 10_000  # characters of a Python literal; NumPy's own limit


def read_npz(path: Path) -> tuple[dict[str, Leaf], dict[str, str]]:
    """Return a leaf per array (in the order of the archive) and no metadata.

    FormatError for a damaged archive, one that declares absurd sizes, object arrays (pickles; nothing is executed) and
    members that are not arrays.
    """
    archive = open_zip(path)
    members = [_Member(archive, path, info.filename) for info in archive.infolist()]
    return {member.name: member.leaf() for member in members}, {}


@dataclass(frozen=True)
class _Member:
    """One array of an archive."""

    archive: ZipFile
    path: Path
    filename: str

    @property
    def name(self) -> str:
        return self.filename.removesuffix(".npy")

    def leaf(self) -> Leaf:
        """Read the header, check it against the declared size, and return the leaf."""
        with self._open() as file:
            shape, fortran, stored = _header(file)
            nbytes = self.archive.getinfo(self.filename).file_size - file.tell()
        dtype = self._dtype(stored)
        if min(shape, default=0) < 0 or prod(shape) * stored.itemsize != nbytes:
            raise FormatError(
                f"array {self.name!r} is not as long as its shape says",
                file=self.path,
                expected=f"{dtype} of shape {shape}",
                got=f"{nbytes} bytes",
            )
        return Leaf(shape, dtype, lambda out: _laid_out(self._read(nbytes, out), shape, fortran, stored, dtype))

    def _read(self, nbytes: int, out: Array | None) -> np.ndarray[Any, Any]:
        buffer = np.empty(nbytes, np.uint8) if out is None else scratch(out, nbytes)
        with self._open() as file:
            _header(file)
            _fill(file, writable(buffer))
        return buffer

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        """Open the member; what goes wrong inside becomes a FileError or FormatError."""
        errors = (os_errors("read the file", self.path), damage(self.path, self.filename))
        with errors[0], errors[1], self.archive.open(self.filename) as file:
            yield file

    def _dtype(self, stored: np.dtype[Any]) -> str:
        """Return the dtype name; two bytes of unnamed content are bf16, as NumPy and MLX write it."""
        if stored.hasobject:
            raise FormatError(
                f"array {self.name!r} holds pickled objects; nothing was executed",
                file=self.path,
                expected="numbers",
                hint="do not load this file unless you trust its author; ask for a safetensors file",
            )
        if stored == np.dtype("V2") and stored.fields is None:
            return "bfloat16"
        if stored.fields is not None or stored.name not in CODES:
            raise FormatError(
                f"array {self.name!r} has a dtype that no adapter file holds", file=self.path, got=str(stored)
            )
        return str(stored.name)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    return _HEADERS[npy.read_magic(file)](file, max_header_size=_HEADER_LIMIT)


def _fill(file: IO[bytes], view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the data ends early")
        done += count
    file.read(1)  # reaching the end makes zipfile check the sum


def _laid_out(
    raw: np.ndarray[Any, Any], shape: tuple[int, ...], fortran: bool, stored: np.dtype[Any], dtype: str
) -> np.ndarray[Any, Any]:
    """Return the bytes as an array; column by column means a transposed view, foreign byte order a copy."""
    values = raw.view(numpy_dtype(dtype)) if stored.isnative else raw.view(stored).astype(numpy_dtype(dtype))
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)
