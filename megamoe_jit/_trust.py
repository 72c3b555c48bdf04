"""Whom a file is trusted from: code is loaded from directories that nobody but this user or root can write."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path


def own_name() -> str:
    """What a directory of this user is called that lies where everybody may make some, as in the temporary one."""
    return f"megamoe-jit-{os.geteuid()}"


def private_directory(path: Path) -> Path:
    """Create a directory only its owner can write, or check that it is one.

    Code is loaded from what these directories hold, so one that another user could write is refused.

    Raises:
        PermissionError: it belongs to someone else, or others may write to it.
        OSError: it cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    check_private(path)
    return path


def check_private(path: Path, forbidden: int = 0o022) -> None:
    """Refuse a directory that someone other than this user or root owns or may write.

    Args:
        path: the directory.
        forbidden: permission bits it must not have.

    Raises:
        PermissionError: it is such a directory, or not a directory.
        FileNotFoundError: there is nothing there.
    """
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{path} is not a directory")
    problem = owner_problem(status, forbidden)
    if problem:
        raise PermissionError(f"{path} {problem}")


def owner_problem(status: os.stat_result, forbidden: int = 0o022) -> str:
    """Why what has this status cannot be trusted; empty if it can."""
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {status.st_uid}, not to this user ({os.geteuid()})"
    if status.st_mode & forbidden:
        return f"can be written by other users (mode {stat.S_IMODE(status.st_mode):o})"
    return ""
