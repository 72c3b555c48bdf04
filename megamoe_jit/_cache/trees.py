"""Deleting and moving what lies in a cache, whatever kind of file it is: nothing is opened that is no regular file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

__all__ = ["delete", "is_closed", "is_directory", "move", "rename", "tree_bytes", "unlock"]

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def is_directory(path: Path | str) -> bool:
    """Whether there is a directory, and not a link to one."""
    with contextlib.suppress(OSError):
        return stat.S_ISDIR(os.lstat(path).st_mode)
    return False


def is_closed(path: Path) -> bool:
    """Whether there is a directory of this user's into which its mode lets not even its owner look."""
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and status.st_mode & 0o500 != 0o500
    return False


def unlock(path: Path) -> bool:
    """Give the owner all of a directory that they lack something of; whether that changed it."""
    with contextlib.suppress(OSError):
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode) and mode & 0o700 != 0o700:
            os.chmod(path, stat.S_IMODE(mode) | 0o700)
            return True
    return False


def delete(path: Path) -> bool:
    """Delete a directory with all that is in it, or unlink what is none; whether nothing is there now."""
    with contextlib.suppress(OSError):
        if is_directory(path):
            unlock(path)  # what cannot be written cannot be emptied
            import shutil  # which a listing does without

            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
    return not os.path.lexists(path)


def rename(source: Path, target: Path) -> None:
    """Rename; a directory in which its owner may not write, and so not change what `..` is, is opened for that."""
    try:
        os.rename(source, target)
    except PermissionError:
        if not unlock(source):
            raise
        os.rename(source, target)


def move(source: Path, target: Path) -> None:
    """Rename; a directory that the file system does not rename is copied and deleted.

    Overlay file systems, which images of containers are, answer EXDEV for directories of their lower layers.

    Raises:
        OSError: it stays where it is.
    """
    try:
        rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        try:
            if is_directory(source):
                _copy_files(source, target)
            if not delete(source):
                raise
        except OSError:
            delete(target)
            raise


def tree_bytes(folder: Path) -> int:
    """Size of the files in a directory, or of what is none; zero for what is not there."""
    size = 0
    with contextlib.suppress(OSError):
        if not is_directory(folder):
            return os.lstat(folder).st_size
        with os.scandir(folder) as found:
            for item in found:
                with contextlib.suppress(OSError):
                    size += item.stat(follow_symlinks=False).st_size
    return size


def _copy_files(source: Path, target: Path) -> None:
    """The regular files of a directory; what else is in it is left behind."""
    import shutil

    os.mkdir(target, 0o700)
    with os.scandir(source) as found:
        files = [item for item in found if item.is_file(follow_symlinks=False)]
    for item in files:
        copy = target / item.name
        with open(os.open(item.path, _READ), "rb") as old, open(os.open(copy, _WRITE, 0o600), "wb") as new:
            shutil.copyfileobj(old, new)
