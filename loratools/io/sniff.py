"""Which container a file is, by its first bytes and never by its extension."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from loratools.errors import FileError, FormatError, UnsupportedError
from loratools.io.oserrors import os_errors
from loratools.io.zips import open_zip

SAFETENSORS, TORCH_ZIP, TORCH_LEGACY, NPZ, GGUF = "safetensors", "torch-zip", "torch-legacy", "npz", "gguf"

_REFUSED = (
    (0, b"algg", "a ggml LoRA of the time before August 2024", "give the PEFT adapter it was made from"),
    (0, b"ggla", "a ggml LoRA of the time before August 2024", "give the PEFT adapter it was made from"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (257, b"ustar", "a tar archive (.nemo, old .tar)", "unpack it and give the weights file inside"),
    (0, b"\x93NUMPY", "a single NumPy array (.npy) without names", "give the adapter file it was exported from"),
    (0, b"\x89HDF\r\n", "an HDF5 file (.h5)", "convert it to safetensors with the framework that wrote it"),
    (0, b"7z\xbc\xaf", "a 7-Zip archive", "unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it first"),
)  # fmt: skip
_HEAD = 512


def sniff(path: Path) -> str:
    """Return the container of a readable file: ``safetensors``, ``torch-zip``, ``torch-legacy``, ``npz``, ``gguf``.

    Raises FileError if the file cannot be read, UnsupportedError for containers that are known and not read, and
    FormatError for anything else (empty, a git-LFS pointer, text, unknown).
    """
    with os_errors("read the file", path):
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise FileError("not a regular file", file=path)
        with path.open("rb", buffering=0) as file:
            head = os.pread(file.fileno(), _HEAD, 0)
    if not head:
        raise FormatError("the file is empty", file=path, hint="download or copy it again")
    return _by_magic(head, path)


def _by_magic(head: bytes, path: Path) -> str:
    if head[4:9] == b"\0\0\0\0{":  # a length below 4 GiB, then JSON; first, for lengths may spell other magics
        return SAFETENSORS
    for offset, magic, name, hint in _REFUSED:
        if head[offset : offset + len(magic)] == magic:
            raise UnsupportedError(f"this is {name}", file=path, expected=_EXPECTED, hint=hint)
    if head.startswith(b"GGUF"):
        return GGUF
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return TORCH_LEGACY
    if head[8:9] == b"{" and (b"\0" in head[:8] or not _is_text(head)):  # after the length of the header
        return SAFETENSORS
    raise _unknown(head, path)


_EXPECTED = "a safetensors file, a torch .bin/.pt, an .npz, or a GGUF"


def _zip_kind(path: Path) -> str:
    with open_zip(path) as archive:
        names = archive.namelist()
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return TORCH_ZIP
    if names and all(name.endswith(".npy") for name in names):
        return NPZ
    shown = ", ".join(names[:3]) or "nothing"
    raise FormatError(
        "a zip archive that is neither a torch file nor an .npz",
        file=path,
        expected=_EXPECTED,
        got=f"an archive of {shown}",
        hint="if the adapter is inside, unpack it first",
    )


def _unknown(head: bytes, path: Path) -> FormatError:
    if head.startswith(b"version https://git-lfs"):
        return FormatError(
            "this is a git-LFS pointer, not the weights themselves",
            file=path,
            hint="run `git lfs pull` in the repository, or download the file again",
        )
    if not _is_text(head):
        got, hint = f"unknown content beginning {head[:8].hex(' ')}", "check that this is the weights file"
    elif head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        got, hint = "a web page", "the download saved a web page (a login or an error?): download the file itself"
    else:
        got, hint = "a text file", "give the weights file, or the directory that holds it"
    return FormatError("not a weights file", file=path, expected=_EXPECTED, got=got, hint=hint)


def _is_text(head: bytes) -> bool:
    """True for UTF-8 without control characters (a character cut in two at the end is allowed)."""
    text = head.decode("utf-8", "ignore")
    return len(text.encode()) >= len(head) - 3 and not any(ord(c) < 32 and c not in "\t\n\r\f" for c in text)
