"""Writing: safetensors files tensor by tensor, text, and whole directories; complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple

from loratools.errors import FileError, FormatError, LoratoolsError, MismatchError
from loratools.io.atomic import fill_directory, replacing
from loratools.io.dtypes import CODES, as_bytes, dtype_name, to_numpy
from loratools.io.header_errors import LIMIT_BYTES
from loratools.io.oserrors import os_errors
from loratools.io.output import check_output, copy_small_files, write_all
from loratools.leaf import ITEMSIZE, Array

__all__ = ["TensorPlan", "check_output", "copy_small_files", "write_directory", "write_safetensors", "write_text"]

_ORDER = {name: i for i, name in enumerate(CODES)}


class TensorPlan(NamedTuple):
    """A tensor to be written: its name, the name of its dtype, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


class Layout(NamedTuple):
    """A safetensors file before its tensors: the header's bytes, and where each tensor begins."""

    header: bytes
    plan: Mapping[str, TensorPlan]
    starts: Mapping[str, int]
    nbytes: int


def write_safetensors(
    path: str | Path,
    plan: Sequence[TensorPlan],
    chunks: Iterable[tuple[str, Array]],
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> Path:
    """Write a safetensors file from tensors that arrive one after another, in any order; return its path.

    The bytes are those of the official serializer (with more than one metadata key its order is random; ours is
    sorted). Everything is checked before the first byte: names, dtypes and shapes of the plan, output against inputs,
    free space. Memory: one tensor. The file appears complete or not at all.

    Raises ExistsError, FileError, FormatError (a plan that no file can hold), and MismatchError when the tensors are
    not those of the plan.
    """
    path = Path(path)
    _check_file(path, inputs, overwrite)
    try:
        laid = layout(plan, metadata)
        check_space(path, laid.nbytes)
        with replacing(path, overwrite=overwrite) as fd:
            write_all(fd, memoryview(laid.header), 0, path)
            _write_tensors(fd, laid, chunks, path)
    except LoratoolsError as error:
        raise error.at(file=path) from error.__cause__
    return path


def write_text(path: str | Path, text: str, overwrite: bool = False, inputs: Sequence[Path] = ()) -> Path:
    """Write a text file (UTF-8), complete or not at all; return its path."""
    path = Path(path)
    _check_file(path, inputs, overwrite)
    with replacing(path, overwrite=overwrite) as fd:
        write_all(fd, memoryview(text.encode()), 0, path)
    return path


def write_directory(
    target: str | Path, fill: Callable[[Path], None], overwrite: bool = False, inputs: Sequence[Path] = ()
) -> Path:
    """Let ``fill(folder)`` write files into a new directory that appears as ``target``, complete or not at all.

    With ``overwrite`` an old directory is replaced in one step and then deleted. Raises what :func:`check_output` and
    ``fill`` raise, and FileError if a file has the target's name.
    """
    target = Path(target)
    check_output(target, inputs, overwrite)
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir()):
        raise FileError("the output is to be a directory, and a file or link has its name", file=target)
    fill_directory(target, fill, overwrite=overwrite)
    return target


def _check_file(path: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    with os_errors("use the output", path):
        if path.is_dir():
            raise FileError("the output is a directory", file=path, hint="give the name of a file")
    check_output(path, inputs, overwrite)


def layout(plan: Sequence[TensorPlan], metadata: Mapping[str, str] | None, *, keep_order: bool = False) -> Layout:
    """Lay a safetensors file out as the official serializer does: widest dtypes first, then by name.

    With ``keep_order`` the tensors lie in the order of the plan; alignment is then the caller's care.

    FormatError for unknown dtypes, reserved names, metadata that is not text; MismatchError for a name planned twice.
    """
    _check_plan(plan, metadata)
    ordered = list(plan) if keep_order else sorted(plan, key=lambda tensor: (_ORDER[tensor.dtype], tensor.name))
    stops = list(accumulate((tensor.nbytes for tensor in ordered), initial=0))
    offsets = list(pairwise(stops))
    said = {
        tensor.name: {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": list(span)}
        for tensor, span in zip(ordered, offsets, strict=True)
    }
    header = _header({} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}, said)
    starts = {tensor.name: len(header) + start for tensor, (start, _) in zip(ordered, offsets, strict=True)}
    return Layout(header, {tensor.name: tensor for tensor in ordered}, starts, len(header) + stops[-1])


def _header(*parts: Mapping[str, object]) -> bytes:
    joined = {name: value for part in parts for name, value in part.items()}
    try:
        text = json.dumps(joined, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise FormatError("a name or metadata value is not valid Unicode", got=ascii(error.object[:60])) from None
    text += b" " * (-len(text) % 8)
    if len(text) > LIMIT_BYTES:
        raise FormatError(
            "the header would be too large for readers", expected=f"<= {LIMIT_BYTES} bytes", got=len(text)
        )
    return len(text).to_bytes(8, "little") + text


def _check_plan(plan: Sequence[TensorPlan], metadata: Mapping[str, str] | None) -> None:
    seen: set[str] = set()
    for tensor in plan:
        if tensor.name in seen:
            raise MismatchError("a tensor is planned twice", parameter=tensor.name)
        seen.add(tensor.name)
        if tensor.dtype not in CODES:
            raise FormatError(
                f"safetensors cannot hold tensor {tensor.name!r}", expected=", ".join(CODES), got=tensor.dtype
            )
        if tensor.name == "__metadata__":
            raise FormatError("a tensor must not be named '__metadata__' in a safetensors file")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise FormatError("metadata of a safetensors file must be text", got=f"{key!r}: {value!r}")


def check_space(path: Path, needed: int) -> None:
    """Raise FileError if the file system of ``path`` has fewer than ``needed`` bytes left."""
    with os_errors("use the output directory", path.parent):
        disk = os.statvfs(path.parent)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < needed:  # some network file systems tell nothing
        raise FileError(
            "not enough free space for the output",
            file=path,
            expected=f"{needed} bytes",
            got=f"{free} bytes free",
            hint="free some space, or choose another output directory",
        )


def _write_tensors(fd: int, laid: Layout, chunks: Iterable[tuple[str, Array]], path: Path) -> None:
    """Write every planned tensor at its place; MismatchError for a missing, unknown, repeated or misshapen one."""
    missing = dict(laid.plan)
    for name, array in chunks:
        planned = missing.pop(name, None)
        if planned is None:
            raise MismatchError("a tensor was not planned, or came twice", parameter=name)
        found = TensorPlan(name, dtype_name(array), tuple(array.shape))
        if found != planned:
            raise MismatchError(
                "a tensor is not as planned",
                parameter=name,
                expected=f"{planned.dtype} {planned.shape}",
                got=f"{found.dtype} {found.shape}",
            )
        write_all(fd, as_bytes(to_numpy(array)), laid.starts[name], path)
    if missing:
        raise MismatchError(f"{len(missing)} planned tensors did not come", got=", ".join(list(missing)[:3]))
