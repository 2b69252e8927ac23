"""Outputs that are either complete or absent, whatever happens while they are written.

Everything is built under a hidden name that ends in ``.tmp`` in the target's own directory, forced to the disk, and
renamed into place. Any exception removes it. A process that is killed outright leaves at most that hidden name behind,
which may be deleted; the old output stays as it was.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loratools.errors import ExistsError, FileError
from loratools.io.oserrors import file_error, os_errors, remove

_NOT_SYNCABLE = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of <linux/fs.h> and <fcntl.h>


@contextmanager
def replacing(target: Path, *, overwrite: bool) -> Iterator[int]:
    """Give a descriptor of a hidden temporary file that becomes ``target`` when the block ends without error."""
    temp = hidden_sibling(target)
    with os_errors("create the output", target):
        fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            yield fd
            with os_errors("write the output", target):
                os.fsync(fd)
        finally:
            with os_errors("write the output", target):
                os.close(fd)
        refuse_existing(target, overwrite=overwrite)
        with os_errors("rename the output into place", target):
            os.replace(temp, target)  # noqa: PTH105 - one rename(2), as the promise needs
    except BaseException:
        remove(temp)
        raise
    sync(target.parent)


def fill_directory(target: Path, fill: Callable[[Path], None], *, overwrite: bool) -> None:
    """Build a directory under a hidden name with ``fill(directory)`` and put it into place.

    An old directory is exchanged for the new one in one step where the system can (Linux), and removed afterwards.
    Elsewhere it is renamed aside first: a kill within the microseconds between the two renames leaves the old
    directory under ``.NAME-….tmp``, complete; rename it back by hand.
    """
    temp = hidden_sibling(target)
    with os_errors("create the output directory", target):
        temp.mkdir()
    try:
        fill(temp)
        for path in (*temp.rglob("*"), temp):
            sync(path)
        old = _exchanged(temp, target, overwrite)
    except BaseException:
        import shutil

        shutil.rmtree(temp, ignore_errors=True)
        raise
    _forget(old, target)


def publish(temp: Path, target: Path, *, overwrite: bool) -> None:
    """Give a finished file or directory, already forced to the disk, the name of its target, in one step."""
    _forget(_exchanged(temp, target, overwrite), target)


def _exchanged(temp: Path, target: Path, overwrite: bool) -> Path | None:
    refuse_existing(target, overwrite=overwrite)
    return _put_in_place(temp, target)


def _forget(old: Path | None, target: Path) -> None:
    """Force the new name to the disk, then remove what had it before."""
    sync(target.parent)
    if old is not None:
        _remove_old(old, target)


def hidden_sibling(target: Path) -> Path:
    """Return an unused hidden name beside the target, short enough for every file system."""
    return target.with_name(f".{target.name[:32]}-{os.urandom(6).hex()}.tmp")


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise ExistsError if something has the target's name and overwriting was not asked for."""
    if not overwrite and os.path.lexists(target):
        raise ExistsError("the output exists already", file=target, hint="choose another name, or pass --overwrite")


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk, where the file system knows how."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in _NOT_SYNCABLE:
            raise file_error("write the output", path, error) from error


def _put_in_place(temp: Path, target: Path) -> Path | None:
    """Give ``temp`` the target's name; return where the old directory is now, if there was one."""
    with os_errors("rename the output into place", target):
        if not os.path.lexists(target):
            temp.rename(target)
            return None
        if _exchange(temp, target):
            return temp
        aside = hidden_sibling(target)
        target.rename(aside)
        try:
            temp.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        return aside


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step with renameat2(2); False where the system or the file system cannot."""
    import ctypes

    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def _remove_old(old: Path, target: Path) -> None:
    import shutil  # here and above: few runs remove anything, and it costs 2 ms

    try:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    except OSError as error:
        raise FileError(
            "the new output is in place, but the old one could not be removed",
            file=target,
            got=error.strerror,
            hint=f"delete {old}",
        ) from error
