"""One process of a node compiles a kernel while the others wait for it.

The lock only saves work: a cache entry is published by one rename, so two processes that compile the same
kernel do no harm. It therefore never stands in the way: where the file system has no locks, or the holder
takes too long, the caller goes on without it. Locks are kernel-released (flock), so a killed holder
cannot leave one behind, and lie on a node-local file system, since locking over a network one may hang.
Whoever held a lock removes its file; who waited at that file, which has no name any more, looks at the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megamoe_jit._settings.settings import get_settings
from megamoe_jit._trust import own_name, private_directory

LOG = logging.getLogger("megamoe_jit")
PATIENCE_S = 2.0  #: wait this long before saying whom we wait for
POLL_S = 0.005
_TRIES = 16  #: to open the file that is there; more only where a file has another number whenever it is asked for


def lock_dir() -> Path:
    """Where lock files lie: the settings' directory, else a private one on a node-local file system.

    Raises:
        OSError: there is no usable directory.
    """
    chosen = get_settings().lock_dir
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        return chosen
    import tempfile  # a listing takes no lock

    problem: OSError | None = None
    # the temporary directory comes last: to ask for it is to fail where there is none to write to
    named = os.environ.get("XDG_RUNTIME_DIR")
    for base in (*([named] if named else []), "/dev/shm", None):
        try:
            folder = Path(base or tempfile.gettempdir())
            if folder.is_dir():
                return private_directory(folder / own_name())
        except OSError as error:
            problem = error
    raise problem or FileNotFoundError("no directory for lock files")


@contextlib.contextmanager
def key_lock(key: str, label: str, done: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Hold the lock of one cache key while the block runs.

    Args:
        key: the cache key.
        label: what is being compiled, for messages.
        done: asked while waiting; once it says so there is nothing left to wait for.

    Yields:
        Whether the lock is held; the block runs either way.
    """
    lock, held = None, False
    try:
        try:
            lock = _Lock(key)
            held = _taken(lock, label, done)
        except OSError as error:
            LOG.warning("cannot lock for %s (%s); compiling it without a lock", label, error)
        if lock is not None and not held:
            lock.close()
        yield held
    finally:
        if lock is not None:
            lock.close()


@contextlib.contextmanager
def try_lock(name: str) -> Iterator[bool]:
    """Hold a lock if nobody else does; yields False only if somebody does.

    Where there are no locks the block runs as if it were held.
    """
    lock: _Lock | None = None
    free = True
    try:
        try:
            lock = _Lock(name)
            free = lock.acquire()
        except OSError as error:
            LOG.debug("cannot lock %s: %s", name, error)
        yield free
    finally:
        if lock is not None:
            lock.close()


_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_held: set[_Lock] = set()


def _after_fork() -> None:
    """A child must not keep a lock of its parent alive, nor give it back."""
    for lock in _held:
        lock.forsake()
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)


class _Lock:
    """The lock of a name, whose file whoever had it removes: else there would be one for each kernel there ever was."""

    def __init__(self, name: str) -> None:
        self._path = lock_dir() / f"{name}.lock"
        self.handle = os.open(self._path, _FLAGS, 0o600)

    def acquire(self) -> bool:
        """Take it unless somebody else has it."""
        for again in range(_TRIES):
            if again:
                self._let_go()  # its last owner has removed this file, and the next one looks at another
                self.handle = os.open(self._path, _FLAGS, 0o600)
            try:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            _held.add(self)
            if self._is_named():
                break
        return True

    def close(self) -> None:
        """Give it back, if it is held; safe to call twice."""
        if self in _held:
            with contextlib.suppress(OSError):
                if self._is_named():  # else somebody has removed this file, and another's is there
                    os.unlink(self._path)
        self._let_go()

    def forsake(self) -> None:
        """Close the file alone: the lock is another's."""
        handle, self.handle = self.handle, -1
        if handle >= 0:
            with contextlib.suppress(OSError):
                os.close(handle)

    def _is_named(self) -> bool:
        """Whether others who ask for the lock find this file."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.handle), os.lstat(self._path))
        return False

    def _let_go(self) -> None:
        if self in _held:
            _held.discard(self)
            with contextlib.suppress(OSError):
                fcntl.flock(self.handle, fcntl.LOCK_UN)  # a child that was just forked may hold a copy
        self.forsake()


def _taken(lock: _Lock, label: str, done: Callable[[], bool]) -> bool:
    """Take it, as soon as it is free; False if that takes too long, or it is not needed any more."""
    limit = get_settings().lock_timeout_s
    begin = time.monotonic()
    told = False
    while not lock.acquire():
        waited = time.monotonic() - begin
        if done():
            return False
        if waited >= limit:
            LOG.warning("no lock for %s after %g s; compiling it here as well", label, limit)
            return False
        if waited >= PATIENCE_S and not told:
            told = True
            LOG.warning("waiting for %s, which is compiling %s", _owner(lock.handle), label)
        time.sleep(min(POLL_S, limit))
    with contextlib.suppress(OSError):  # of a full disk: this is for messages alone
        os.ftruncate(lock.handle, 0)
        os.pwrite(lock.handle, f"process {os.getpid()}\n".encode(), 0)
    return True


def _owner(handle: int) -> str:
    try:
        return os.pread(handle, 64, 0).decode(errors="replace").strip() or "another process"
    except OSError:
        return "another process"
