"""Entries on disk: read and verified, published by one rename, renamed away before they are deleted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megamoe_jit._cache.entry import CLOCKS_S, CUBIN, META, SOURCE, CacheEntry, Damaged, OtherSchema, last_use
from megamoe_jit._cache.metadata import SCHEMA, dump_metadata
from megamoe_jit._cache.reader import ACCESS, EntryReader
from megamoe_jit._cache.trees import delete, is_closed, is_directory, move, rename, tree_bytes, unlock
from megamoe_jit._compile.cubin import cubin_arch
from megamoe_jit._text import one_line
from megamoe_jit._trust import own_name, private_directory

LOG = logging.getLogger("megamoe_jit")
STALE_STAGING_S = 3600.0
TOUCH_S = 3600.0  #: an entry's last use is noted at most this often
QUARANTINED = 32  #: damaged entries kept for looking into


class PruneReport(NamedTuple):
    """What was removed.

    Attributes:
        removed: keys of the entries.
        bytes: size of everything that was removed, damaged entries included.
        kept: keys of the entries that could not be removed.
    """

    removed: tuple[str, ...]
    bytes: int
    kept: tuple[str, ...] = ()


class EntryStore(EntryReader):
    """Reading and writing of the entries under one root; `KernelCache` adds the upkeep."""

    def load(self, key: str, symbol: str | None = None) -> CacheEntry | None:
        """Read and verify an entry, and note its use.

        Args:
            key: from `cache_key`.
            symbol: the one kernel that it must define.

        Returns:
            The entry; None if there is none, or none to be trusted (a damaged one is moved to quarantine).
        """
        entry = self._attempt(key, symbol, self.quarantine)
        if entry is not None:
            self.touch(key)
        return entry

    def store(self, key: str, cubin: bytes, source: str, meta: Mapping[str, Any]) -> bool:
        """Publish an entry; never raises `OSError`.

        Args:
            key: from `cache_key`.
            cubin: the compiled kernel.
            source: the flattened source, kept beside it for reading.
            meta: plain data about it; identity, size, digest and date are added.

        Returns:
            Whether the entry is there now, written by this call or by someone else meanwhile.
        """
        text = source.encode()
        document = {
            **meta,
            "schema": SCHEMA,
            "key": key,
            "arch": cubin_arch(cubin),
            "cubin_bytes": len(cubin),
            "cubin_sha256": hashlib.sha256(cubin).hexdigest(),
            "source_bytes": len(text),
            "source_sha256": hashlib.sha256(text).hexdigest(),
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": one_line(_host()),
        }
        return self.publish(key, {SOURCE: text, CUBIN: cubin, META: dump_metadata(document)})

    def publish(self, key: str, files: Mapping[str, bytes]) -> bool:
        """Put the files of one entry in place, at once; what `store` does when the files are ready."""
        staging: Path | None = None
        try:
            self._prepare()
            self._sweep()
            staging = self.path / ".tmp" / f"{_host()}-{os.getpid()}-{os.urandom(6).hex()}"
            staging.mkdir(mode=0o700)
            for name, data in files.items():
                _write(staging / name, data, 0o644 if self.shared else 0o600)
            if self.shared:
                staging.chmod(0o755)
            _sync_directory(staging)
            target = self.entry_path(key)
            self._make_way(target.parent)
            self._directory(target.parent)
            if not self._rename(key, staging, target):
                return True
            staging = None
            _sync_directory(target.parent)
        except OSError as error:
            cause = ACCESS if isinstance(error, PermissionError) else "write"
            self._warn(cause, f"cannot write kernel cache {self.path}: {error}; nothing is kept there")
            return False
        finally:
            if staging is not None:
                delete(staging)
        self._published(sum(map(len, files.values())))
        return True

    def writable(self) -> bool:
        """Whether an entry can be put in place, as far as permissions tell; makes the directories on the way."""
        try:
            self._prepare()
        except OSError:
            return False
        return os.access(self.path / ".tmp", os.W_OK | os.X_OK)

    def remove(self, keys: Iterable[str]) -> PruneReport:
        """Delete entries; those that are not there are left out of the report."""
        removed, kept, size = list[str](), list[str](), 0
        for key in [keys] if isinstance(keys, str) else keys:
            folder = self.entry_path(key)
            self._open(folder.parent)
            freed = tree_bytes(folder)
            if self._bury(folder):
                removed.append(key)
                size += freed
            elif os.path.lexists(folder):
                kept.append(key)
        return PruneReport(tuple(removed), size, tuple(kept))

    def touch(self, key: str) -> None:
        """Note a use, at most hourly, in a modification time: access times are off on many mounts."""
        if self.read_only:
            return
        path, now = self.entry_path(key) / META, time.time()
        with contextlib.suppress(OSError):
            if not now - TOUCH_S <= path.lstat().st_mtime <= now + CLOCKS_S:
                os.utime(path)

    def quarantine(self, key: str) -> bool:
        """Move an entry out of the way, kept for looking into; whether that worked."""
        if self.read_only:
            return False
        try:
            self._open(self.entry_path(key).parent)
            self.entry_path(key).lstat()
            place = self.path / "quarantine"
            self._make_way(place)
            private_directory(place)
            move(self.entry_path(key), place / f"{key}-{os.urandom(4).hex()}")
        except OSError as error:
            LOG.debug("cannot move %s to quarantine: %s", self.entry_path(key), error)
            return False
        with contextlib.suppress(OSError):
            aside = sorted(place.iterdir(), key=lambda path: path.lstat().st_ctime)
            for path in aside[:-QUARANTINED]:
                self._bury(path)
        return True

    def _prepare(self) -> None:
        """Create the directories in which entries are written, or check them."""
        # where everybody may make directories, one by this user's name may be another's, or a link of theirs
        if self.root.name == own_name() or not self.root.exists():
            self._directory(self.root)
        self._directory(self.path)
        self._make_way(self.path / ".tmp")
        private_directory(self.path / ".tmp")

    def _make_way(self, path: Path) -> None:
        """Unlink what lies in the place of one of our directories and is none; open one that is closed to us."""
        self._open(path)
        if os.path.lexists(path) and not is_directory(path) and delete(path):
            LOG.warning("%s was not a directory, and is removed", path)

    def _open(self, path: Path) -> None:
        """Give the owner all of a directory that is closed to them."""
        if not self.read_only and is_closed(path) and unlock(path):
            LOG.warning("%s was closed to its owner, and is opened", path)

    def _directory(self, path: Path) -> None:
        """Create a directory on the way to an entry, or check it."""
        private_directory(path)
        if self.shared:
            path.chmod(0o755)

    def _published(self, size: int) -> None:
        """Called after each publish with the size of the entry."""

    def _rename(self, key: str, staging: Path, target: Path) -> bool:
        """Publish; False if another writer was first.

        Raises:
            OSError: it cannot be put there; what is there already is of no use and stays.
        """
        for _ in range(2):
            try:
                os.rename(staging, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                try:
                    self.read(key)
                except (OtherSchema, Damaged) as problem:
                    if not self.quarantine(key):
                        what = f"{target} cannot be moved away and is of no use: {problem}"
                        raise OSError(what) from None
                    continue
                except FileNotFoundError:  # it may be there and not be visible yet: then it is somebody's
                    pass
                return False
            else:
                return True
        return False

    def _bury(self, folder: Path) -> bool:
        """Rename to the trash, then delete; whether it was there and is gone now."""
        grave = self.path / ".tmp" / f"removed-{os.urandom(6).hex()}"
        try:
            if self.read_only:
                raise PermissionError("it is read-only")
            folder.lstat()  # before any directory is made: where there is no entry there may be no cache
            self._make_way(grave.parent)
            private_directory(grave.parent)
            _rename_or_stay(folder, grave)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            self._warn("remove", f"cannot remove from kernel cache {self.path}: {error}")
            return False
        for place in (grave, folder):  # a directory that could not be renamed is deleted where it is
            if not delete(place):
                self._warn("remove", f"cannot remove {place}")
        return not os.path.lexists(folder)

    def _sweep(self) -> None:
        """Drop what killed writers left behind."""
        now = time.time()
        with contextlib.suppress(OSError):
            for path in (self.path / ".tmp").iterdir():
                with contextlib.suppress(OSError):
                    if last_use(path.lstat(), now) < now - STALE_STAGING_S:
                        delete(path)


def _rename_or_stay(folder: Path, target: Path) -> None:
    """Rename, but where the file system does not rename directories (see `move`)."""
    try:
        rename(folder, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise


def _host() -> str:
    return os.uname().nodename


def _write(path: Path, data: bytes, mode: int) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot synchronise a directory
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
