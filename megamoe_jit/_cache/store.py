"""Entries on disk: read and verified, published by one rename, renamed away before they are deleted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe_jit._cache.entry import (
    CUBIN,
    IMPORTED,
    META,
    SCHEMA,
    SOURCE,
    CacheEntry,
    Damaged,
    EntryInfo,
    by_compiler,
    is_key,
    read_entry,
    read_info,
)
from megamoe_jit._cache.locks import check_private, private_directory
from megamoe_jit._compile.cubin import cubin_arch

__all__ = ["EntryStore", "PruneReport", "tree_bytes"]

LOG = logging.getLogger("megamoe_jit")
STALE_STAGING_S = 3600.0
TOUCH_S = 3600.0  #: an entry's last use is noted at most this often
QUARANTINED = 32  #: damaged entries kept for looking into
_ACCESS = "access"  #: cause of a warning: who may not read may not write either, and is told once


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What was removed.

    Attributes:
        removed: keys of the entries.
        bytes: size of everything that was removed, damaged entries included.
        kept: keys of the entries that could not be removed.
    """

    removed: tuple[str, ...]
    bytes: int
    kept: tuple[str, ...] = ()


class EntryStore:
    """Reading and writing of the entries under one root; `KernelCache` adds the upkeep.

    Args:
        root: the directory; entries lie in a subdirectory named after the schema.
        read_only: never write, not even to note a use or to put a damaged entry aside.
        shared: let everybody read what is published.
    """

    def __init__(self, root: Path, read_only: bool = False, *, shared: bool = False) -> None:
        self.root = root
        self.path = root / f"v{SCHEMA}"  #: where this schema's entries lie
        self.read_only = read_only
        self.shared = shared
        self.forbidden = 0o002 if read_only else 0o022  #: permission bits that nothing in it may have
        self._by_source: dict[str, list[EntryInfo]] | None = None
        self._warned: set[str] = set()

    def entry_path(self, key: str) -> Path:
        """Directory of an entry, whether it exists or not."""
        return self.path / key[:2] / key

    def keys(self) -> list[str]:
        """Keys of all entries, whole or not."""
        return [key for key, _ in self._folders()]

    def holds(self, key: str) -> bool:
        """Whether there is an entry, whole or not; what this user may not see is not there."""
        return os.path.isdir(self.entry_path(key))

    def handed_over(self, key: str) -> bool:
        """Whether an entry is taken whoever compiled it: one of a read-only cache, or an imported one."""
        return self.read_only or (self.entry_path(key) / IMPORTED).exists()

    def load(self, key: str) -> CacheEntry | None:
        """Read and verify an entry.

        Args:
            key: from `cache_key`.

        Returns:
            The entry; None if there is none, or none to be trusted (a damaged one is moved to quarantine).
        """
        folder = self.entry_path(key)
        try:
            check_private(self.path, self.forbidden)
            files, meta = read_entry(key, folder, self.forbidden)
        except FileNotFoundError:
            if self.read_only and not self.root.is_dir():
                self._warn("missing", f"read-only kernel cache {self.root} does not exist")
            return None
        except Damaged as damage:
            message = f"cached kernel {folder} is damaged ({damage}) and is not used"
            if self.quarantine(key):
                LOG.warning("%s", message)
            else:
                self._warn(key, message)
            return None
        except OSError as error:
            self._unreadable(error)
            return None
        if meta["schema"] != SCHEMA:
            return None
        self.touch(key)
        return CacheEntry(key, files[CUBIN], meta, folder)

    def load_source(self, source: str, major: int | None = None, but_not: Container[str] = ()) -> CacheEntry | None:
        """An entry of this source by whatever compiler: any of a read-only cache, an imported one of another.

        Args:
            source: from `source_id`.
            major: CUDA major version to prefer, with older ones after it and newer ones last.
            but_not: digests of binaries to leave out.
        """
        found = (info for info in self._sources().get(source, []) if info.meta.get("cubin_sha256") not in but_not)
        for info in by_compiler(found, major):
            entry = self.load(info.key)
            if entry is not None:
                return entry
        return None

    def _sources(self) -> dict[str, list[EntryInfo]]:
        """Entries that `load_source` may take, by source; remembered where nothing changes.

        Several threads may ask at once, so nobody sees the table before it is whole.
        """
        known = self._by_source
        if known is None or not self.read_only:
            known = {}
            for info in self.entries():
                if self.handed_over(info.key):
                    known.setdefault(str(info.meta.get("source_id")), []).append(info)
            self._by_source = known
        return known

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
            "host": _host(),
        }
        about = json.dumps(document, indent=1, sort_keys=True).encode()
        return self.publish(key, {SOURCE: text, CUBIN: cubin, META: about})

    def publish(self, key: str, files: Mapping[str, bytes]) -> bool:
        """Put the files of one entry in place, at once; what `store` does when the files are ready."""
        staging: Path | None = None
        try:
            if not self.root.exists():
                self._directory(self.root)
            self._directory(self.path)
            private_directory(self.path / ".tmp")
            self._sweep()
            staging = self.path / ".tmp" / f"{_host()}-{os.getpid()}-{os.urandom(6).hex()}"
            staging.mkdir(mode=0o700)
            for name, data in files.items():
                _write(staging / name, data, 0o644 if self.shared else 0o600)
            if self.shared:
                staging.chmod(0o755)
            _sync_directory(staging)
            target = self.entry_path(key)
            self._directory(target.parent)
            if not self._rename(key, staging, target):
                return True
            staging = None
            _sync_directory(target.parent)
        except OSError as error:
            cause = _ACCESS if isinstance(error, PermissionError) else "write"
            self._warn(cause, f"cannot write kernel cache {self.path}: {error}; nothing is kept there")
            return False
        finally:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
        self._published(sum(map(len, files.values())))
        return True

    def entries(self) -> list[EntryInfo]:
        """Every entry whose metadata can be read, oldest first; nothing else is verified."""
        return self._survey()[0]

    def _survey(self) -> tuple[list[EntryInfo], list[tuple[str, str]]]:
        """What `entries` gives, and keys and directories of what it leaves out."""
        found = [(read_info(*place), place) for place in self._folders()]
        entries = sorted((info for info, _ in found if info), key=lambda info: (info.created_at, info.key))
        return entries, [place for info, place in found if info is None]

    def remove(self, keys: Iterable[str]) -> PruneReport:
        """Delete entries; those that are not there are left out of the report."""
        removed, kept, size = list[str](), list[str](), 0
        for key in [keys] if isinstance(keys, str) else keys:
            folder = self.entry_path(key)
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
        path = self.entry_path(key) / META
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - TOUCH_S:
                os.utime(path)

    def quarantine(self, key: str) -> bool:
        """Move an entry out of the way, kept for looking into; whether that worked."""
        if self.read_only:
            return False
        try:
            place = private_directory(self.path / "quarantine")
            os.rename(self.entry_path(key), place / f"{key}-{os.urandom(4).hex()}")
        except OSError as error:
            LOG.debug("cannot move %s to quarantine: %s", self.entry_path(key), error)
            return False
        with contextlib.suppress(OSError):
            aside = sorted(place.iterdir(), key=lambda path: path.lstat().st_ctime)
            for path in aside[:-QUARANTINED]:
                self._bury(path)
        return True

    def _directory(self, path: Path) -> None:
        """Create a directory on the way to an entry, or check it."""
        private_directory(path)
        if self.shared:
            path.chmod(0o755)

    def _published(self, size: int) -> None:
        """Called after each publish with the size of the entry."""

    def _folders(self) -> Iterator[tuple[str, str]]:
        """Keys and directories of all entries, whole or not."""
        try:
            groups = [each for each in os.scandir(self.path) if len(each.name) == 2]
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._unreadable(error)
            return
        for group in groups:
            with contextlib.suppress(OSError):
                found = (each for each in os.scandir(group.path) if each.name.startswith(group.name))
                yield from ((each.name, each.path) for each in found if is_key(each.name))

    def _rename(self, key: str, staging: Path, target: Path) -> bool:
        """Publish; False if another writer was first, or cannot be displaced."""
        for _ in range(2):
            try:
                os.rename(staging, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                try:
                    _, meta = read_entry(key, target, self.forbidden)
                except (OSError, Damaged):  # it may be there and not be visible yet: then it is somebody's
                    return False
                if meta["schema"] == SCHEMA or not self.quarantine(key):
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
            private_directory(grave.parent)
            os.rename(folder, grave)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._warn("remove", f"cannot remove from kernel cache {self.path}: {error}")
            return False
        shutil.rmtree(grave, ignore_errors=True)
        return True

    def _sweep(self) -> None:
        """Drop what killed writers left behind."""
        limit = time.time() - STALE_STAGING_S
        with contextlib.suppress(OSError):
            for path in (self.path / ".tmp").iterdir():
                if path.stat().st_mtime < limit:
                    shutil.rmtree(path, ignore_errors=True)

    def _unreadable(self, error: OSError) -> None:
        """Say once that the cache cannot be read; it counts as empty."""
        if error.errno != errno.ESTALE:  # removed meanwhile, as network file systems say it
            cause = _ACCESS if isinstance(error, PermissionError) else "read"
            self._warn(cause, f"cannot read kernel cache {self.path}: {error}")

    def _warn(self, cause: str, message: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            LOG.warning("%s", message)


def tree_bytes(folder: Path) -> int:
    """Size of the files in a directory; zero for what is not there."""
    with contextlib.suppress(OSError):
        return sum(item.stat().st_size for item in os.scandir(folder))
    return 0


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
