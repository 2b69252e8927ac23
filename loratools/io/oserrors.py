"""What the operating system refused, in words a user can act on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loratools.errors import FileError, LoratoolsError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_HINTS = {
    errno.ENOENT: "check the path; nothing is there",
    errno.EACCES: "check the permissions of the file and of its directory",
    errno.EPERM: "check the permissions of the file and of its directory",
    errno.EROFS: "the file system is read-only: choose another output directory",
    errno.ENOSPC: "the disk is full: free some space, or choose another output directory",
    errno.EDQUOT: "your disk quota is used up: free some space, or choose another output directory",
    errno.EMFILE: "too many open files: raise the limit with `ulimit -n`",
    errno.EISDIR: "a directory has this name: name a file",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.ENAMETOOLONG: "choose a shorter file name",
    errno.EIO: "the disk or the network failed: check it, then try again",
}


@contextmanager
def os_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError inside into a FileError ``cannot <doing>`` that names the file and what to do."""
    try:
        yield
    except LoratoolsError:
        raise
    except OSError as error:
        raise file_error(doing, path, error) from error


def file_error(doing: str, path: Path, error: OSError) -> FileError:
    """Return the FileError that tells about ``error``, with the original's errno."""
    told = FileError(f"cannot {doing}", file=path, got=error.strerror or str(error), hint=_HINTS.get(error.errno or 0))
    told.errno = error.errno
    return told


def remove(path: Path) -> None:
    """Remove a file if it is there and can be removed: the clean-up after an error that is told already."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
