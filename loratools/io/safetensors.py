"""The safetensors container: headers checked by the official parser, tensors read where they lie.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loratools.errors import FormatError, LoratoolsError, UnsupportedError
from loratools.io.dtypes import NAMES
from loratools.io.header_errors import explained, too_long
from loratools.io.oserrors import os_errors
from loratools.io.sidecar import parse_json
from loratools.io.sniff import SAFETENSORS, sniff
from loratools.io.source import Signature, Source, Stored, signature
from loratools.leaf import Leaf

METADATA = "__metadata__"


class Entry(NamedTuple):
    """One tensor of a header; ``start`` and ``stop`` are positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a safetensors file says about itself; ``entries`` in the order of their bytes."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    seen: Signature

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Dtype name by name."""
        return {name: entry.dtype for name, entry in self.entries.items()}


def peek(path: str | Path) -> Header:
    """Read the header of a safetensors file: names, dtypes, shapes, metadata; no tensor is read.

    Cost: one read of the header and the official parser's check. Raises FormatError for anything the official parser
    refuses, for duplicate keys and for dtypes we cannot hold; FileError if the file cannot be read.
    """
    path = Path(path)
    container = sniff(path)
    if container != SAFETENSORS:
        raise FormatError("not a safetensors file", file=path, expected=SAFETENSORS, got=container)
    return read_header(path)


def read_header(path: Path) -> Header:
    """Read the header of a file that begins like a safetensors file."""
    try:
        raw, seen = _raw_header(path)
        _check_officially(path, raw, seen)
        said = parse_json(raw)
    except LoratoolsError as error:
        raise error.at(file=path) from error.__cause__
    metadata = said.pop(METADATA, None) or {}
    begin = 8 + len(raw)
    entries = {name: _entry(name, info, begin, path) for name, info in said.items()}
    return Header(path, dict(sorted(entries.items(), key=lambda item: item[1].start)), metadata, seen)


def read_tensors(path: Path) -> tuple[dict[str, Leaf], Mapping[str, str]]:
    """Return a leaf per tensor, in the order of their bytes, and the metadata."""
    header = read_header(path)
    source = Source(path, header.seen)
    leaves = {
        name: Leaf(e.shape, e.dtype, Stored(source, e.start, e.stop - e.start, e.dtype, e.shape))
        for name, e in header.entries.items()
    }
    return leaves, header.metadata


def _raw_header(path: Path) -> tuple[bytes, Signature]:
    with os_errors("read the file", path), path.open("rb", buffering=0) as file:
        stat = os.fstat(file.fileno())
        length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
        if problem := too_long(length, stat.st_size):
            raise problem
        return os.pread(file.fileno(), length, 8), signature(stat)


def _check_officially(path: Path, raw: bytes, seen: Signature) -> None:
    import safetensors

    try:
        with os_errors("read the file", path), safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise explained(str(error), raw, seen[1]) from None


def _entry(name: str, info: Mapping[str, Any], begin: int, path: Path) -> Entry:
    code = info["dtype"]
    if code not in NAMES:
        raise UnsupportedError(
            f"the dtype of tensor {name!r} is not supported", file=path, expected=", ".join(NAMES), got=code
        )
    start, stop = info["data_offsets"]
    return Entry(NAMES[code], tuple(info["shape"]), begin + start, begin + stop)
