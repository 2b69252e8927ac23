"""Zip archives as containers: judged by what their directory declares, before anything is unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import FormatError, LoratoolsError
from loratools.io.oserrors import os_errors

if TYPE_CHECKING:
    from zipfile import ZipFile

_RATIO = 100  # weights hardly compress, and a file that is mostly zeros still stays below
_FREE_BYTES = 64 << 20
_PARSING = (ValueError, LookupError, RuntimeError, TypeError, SyntaxError)  # of zip and array headers


def open_zip(path: Path) -> ZipFile:
    """Open an archive after refusing bombs, encrypted members and repeated names; FormatError if it is damaged."""
    import zipfile

    with os_errors("read the file", path), damage(path):
        archive = zipfile.ZipFile(path)
    try:
        _check(archive, path)
    except FormatError:
        archive.close()
        raise
    return archive


def zip_is_plain(path: Path) -> bool:
    """True if no member is compressed, so that members can be mapped; raises what :func:`open_zip` raises."""
    with open_zip(path) as archive:
        return not any(member.compress_type for member in archive.infolist())


@contextmanager
def damage(path: Path, member: str | None = None) -> Iterator[None]:
    """Turn what zipfile and NumPy raise on damaged content into a FormatError."""
    import struct
    import zipfile
    import zlib

    try:
        yield
    except LoratoolsError:
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, *_PARSING) as error:
        what = "the archive" if member is None else f"member {member!r} of the archive"
        raise FormatError(
            f"{what} is damaged, cut short, or of an unknown kind",
            file=path,
            got=str(error) or type(error).__name__,
            hint="download or write the file again",
        ) from None


def _check(archive: ZipFile, path: Path) -> None:
    members = archive.infolist()
    with os_errors("read the file", path):
        size = path.stat().st_size
    limit, declared = _FREE_BYTES + _RATIO * size, sum(member.file_size for member in members)
    if declared > limit:
        raise FormatError(
            "the archive would unpack to more than any weights do",
            file=path,
            expected=f"at most {limit} bytes from a file of {size}",
            got=f"{declared} bytes",
            hint="the file is hostile or damaged; nothing was unpacked",
        )
    if any(member.flag_bits & 1 for member in members):
        raise FormatError("the archive is encrypted", file=path, hint="write it again without a password")
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise FormatError("a name occurs twice in the archive", file=path, hint="write the file again")
