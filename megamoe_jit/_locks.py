"""One process of a node compiles a kernel while the others wait for it.

The lock only saves work: a cache entry is published by one rename, so two processes that compile the same
kernel do no harm. It therefore never stands in the way: where the file system has no locks, or the holder
takes too long, the caller goes on without it. Locks are kernel-released (flock), so a killed holder
cannot leave one behind, and lie on a node-local file system, since locking over a network one may hang.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megamoe_jit._settings import get_settings

if TYPE_CHECKING:
    import filelock

__all__ = ["key_lock", "lock_dir", "private_directory"]

LOG = logging.getLogger("megamoe_jit")
PATIENCE_S = 2.0  #: wait this long before saying whom we wait for
POLL_S = 0.02


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


def check_private(path: Path) -> None:
    """Refuse a directory that someone other than this user or root owns or may write.

    Raises:
        PermissionError: it is such a directory, or not a directory.
        FileNotFoundError: there is nothing there.
    """
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{path} is not a directory")
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{path} belongs to user {status.st_uid}, not to this user ({os.geteuid()})")
    if status.st_mode & 0o022:
        raise PermissionError(f"{path} can be written by other users (mode {stat.S_IMODE(status.st_mode):o})")


def lock_dir() -> Path:
    """Where lock files lie: the settings' directory, else a private one on a node-local file system.

    Raises:
        OSError: there is no usable directory.
    """
    chosen = get_settings().lock_dir
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        return chosen
    name = f"megamoe-jit-{os.geteuid()}"
    problem: OSError | None = None
    for base in (os.environ.get("XDG_RUNTIME_DIR"), "/dev/shm", tempfile.gettempdir()):
        if not base or not os.path.isdir(base):
            continue
        try:
            return private_directory(Path(base) / name)
        except OSError as error:
            problem = error
    raise problem or FileNotFoundError("no directory for lock files")


@contextlib.contextmanager
def key_lock(key: str, label: str) -> Iterator[bool]:
    """Hold the lock of one cache key while the block runs.

    Args:
        key: the cache key.
        label: what is being compiled, for messages.

    Yields:
        Whether the lock is held; the block runs either way.
    """
    with contextlib.ExitStack() as stack:
        yield _enter(stack, key, label)


def _enter(stack: contextlib.ExitStack, key: str, label: str) -> bool:
    import filelock

    limit = get_settings().lock_timeout_s
    try:
        folder = lock_dir()
        lock = _new_lock(folder / f"{key}.lock")
        owner = folder / f"{key}.owner"
        try:
            lock.acquire(timeout=min(limit, PATIENCE_S), poll_interval=POLL_S)
        except filelock.Timeout:
            LOG.warning("waiting for %s, which is compiling %s", _owner(owner), label)
            lock.acquire(timeout=max(0.0, limit - PATIENCE_S), poll_interval=POLL_S)
    except filelock.Timeout:
        LOG.warning("no lock for %s after %g s; compiling it here as well", label, limit)
        return False
    except (OSError, NotImplementedError) as error:
        LOG.warning("cannot lock for %s (%s); compiling it without a lock", label, error)
        return False
    stack.callback(_release, lock, label)
    with contextlib.suppress(OSError):
        owner.write_text(f"process {os.getpid()}\n")
    return True


def _new_lock(path: Path) -> filelock.BaseFileLock:
    import filelock

    try:  # newer versions would fall back to a lock file that outlives a killed holder
        return filelock.FileLock(path, mode=0o600, fallback_to_soft=False)
    except TypeError:
        return filelock.FileLock(path, mode=0o600)


def _release(lock: filelock.BaseFileLock, label: str) -> None:
    try:
        lock.release()
    except OSError as error:
        LOG.warning("cannot release the lock for %s: %s", label, error)


def _owner(path: Path) -> str:
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"
