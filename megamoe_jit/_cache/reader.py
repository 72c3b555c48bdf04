"""The entries under one root as they are: found, read, verified and listed, and nothing there is changed."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from megamoe_jit._cache.entry import (
    CUBIN,
    IMPORTED,
    CacheEntry,
    Damaged,
    EntryInfo,
    by_compiler,
    check_kernel,
    read_entry,
    read_info,
)
from megamoe_jit._cache.identity import is_key
from megamoe_jit._cache.metadata import SCHEMA, Metadata
from megamoe_jit._trust import check_private

LOG = logging.getLogger("megamoe_jit")
ACCESS = "access"  #: cause of a warning: who may not read may not write either, and is told once


class EntryReader:
    """Reading of the entries under one root; `EntryStore` adds the writing, and `KernelCache` says what it is given."""

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
        return self.read_only or os.path.exists(f"{self.path}/{key[:2]}/{key}/{IMPORTED}")

    def read(self, key: str, *, with_source: bool = False) -> tuple[dict[str, bytes], Metadata]:
        """Files and metadata of an entry, verified; raises as `read_entry`."""
        return read_entry(key, self.entry_path(key), self.forbidden, with_source=with_source)

    def peek(self, key: str, symbol: str | None = None) -> CacheEntry:
        """Read and verify an entry, without a trace: no use is noted, nothing put aside.

        Args:
            key: from `cache_key`.
            symbol: the one kernel that it must define.

        Raises:
            FileNotFoundError: there is none.
            Damaged: it must not be used.
            OSError: it cannot be read, or lies where others can write.
        """
        folder = self.entry_path(key)
        check_private(self.path, self.forbidden)
        files, meta = read_entry(key, folder, self.forbidden)
        if symbol is not None:
            check_kernel(files[CUBIN], meta, symbol)
        return CacheEntry(key, files[CUBIN], meta, folder)

    def usable(self, key: str, symbol: str) -> bool:
        """Whether `load` would give the entry; if it is there and would not, a warning says why not."""
        return self._attempt(key, symbol, lambda _: False) is not None

    def _attempt(self, key: str, symbol: str | None, put_aside: Callable[[str], bool]) -> CacheEntry | None:
        """What `peek` gives; a warning where that fails for another reason than that there is nothing."""
        try:
            return self.peek(key, symbol)
        except FileNotFoundError:
            if self.read_only and not self.root.is_dir():
                self._warn("missing", f"read-only kernel cache {self.root} does not exist")
        except Damaged as damage:
            message = f"cached kernel {self.entry_path(key)} is damaged ({damage}) and is not used"
            if put_aside(key):
                LOG.warning("%s", message)
            else:
                self._warn(key, message)
        except OSError as error:
            self._unreadable(error)
        return None

    def of_source(self, source: str, major: int | None = None) -> list[EntryInfo]:
        """What was handed over of this source, by whatever compiler, in the order in which a call tries it.

        Args:
            source: from `source_id`.
            major: CUDA major version to prefer, with older ones after it and newer ones last.
        """
        return by_compiler(self._sources().get(source, ()), major)

    def _sources(self) -> dict[str, list[EntryInfo]]:
        """What was handed over, by source; remembered where nothing changes.

        Several threads may ask at once, so nobody sees the table before it is whole.
        """
        known = self._by_source
        if known is None or not self.read_only:
            known = {}
            for info in self.entries(self.handed_over):
                known.setdefault(info.meta.get("source_id", ""), []).append(info)
            self._by_source = known
        return known

    def entries(self, chosen: Callable[[str], bool] = lambda _: True) -> list[EntryInfo]:
        """Every entry whose metadata can be read, oldest first; nothing else is verified.

        Args:
            chosen: whether the entry of a key is asked for.
        """
        return self._survey(chosen)[0]

    def _survey(self, chosen: Callable[[str], bool] = lambda _: True) -> tuple[list[EntryInfo], list[str]]:
        """What `entries` gives of the chosen keys, and the keys of what it leaves out."""
        entries, rest, now = list[EntryInfo](), list[str](), time.time()
        for key, folder in self._folders():
            if chosen(key):
                info = read_info(key, folder, now)
                if info is None:
                    rest.append(key)
                else:
                    entries.append(info)
        return sorted(entries, key=lambda info: (info.created_at, info.key)), rest

    def _folders(self) -> list[tuple[str, str]]:
        """Keys and directories of all entries, whole or not."""
        folders = list[tuple[str, str]]()
        try:
            with os.scandir(self.path) as found:
                groups = [each for each in found if len(each.name) == 2]
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._unreadable(error)
            return folders
        for group in groups:
            with contextlib.suppress(OSError):  # of one alone, as where it is a circle of links
                if group.is_dir(follow_symlinks=self.read_only):
                    with os.scandir(group.path) as found:
                        for each in found:
                            if each.name.startswith(group.name) and is_key(each.name):
                                folders.append((each.name, each.path))
        return folders

    def _unreadable(self, error: OSError) -> None:
        """Say once that the cache cannot be read; it counts as empty."""
        if error.errno != errno.ESTALE:  # removed meanwhile, as network file systems say it
            cause = ACCESS if isinstance(error, PermissionError) else "read"
            self._warn(cause, f"cannot read kernel cache {self.path}: {error}")

    def _warn(self, cause: str, message: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            LOG.warning("%s", message)
