"""Compiled kernels on disk: named by content, verified on load, published by one rename.

Layout::

    <root>/v1/<first two hex digits>/<key>/kernel.cubin
                                           meta.json
                                           kernel.cu
    <root>/v1/.tmp/                        entries being written, entries being deleted
    <root>/v1/quarantine/                  entries that failed verification

An entry is complete or absent: it is written in a staging directory, synchronised, and renamed. Whoever
loses the race for a name drops its copy, since equal names mean equal inputs. The cache may fail in any
way without failing the caller: every problem is one warning, and the kernel that was just compiled is
used from memory. A read-only cache has the same layout, is searched before the user's and never written.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from megamoe_jit._cache.entry import Damaged, EntryInfo
from megamoe_jit._cache.evict import LOW_WATER, to_remove
from megamoe_jit._cache.locks import try_lock
from megamoe_jit._cache.store import EntryStore, PruneReport
from megamoe_jit._cache.trees import delete, is_closed, is_directory, tree_bytes
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._trust import check_private

LOG = logging.getLogger("megamoe_jit")


class Problem(NamedTuple):
    """Something `KernelCache.verify` found.

    Attributes:
        key: the entry; empty for the cache as a whole.
        path: what is wrong.
        message: how.
        fixed: whether it was mended: an entry moved to quarantine, permissions corrected.
    """

    key: str
    path: Path
    message: str
    fixed: bool


class KernelCache(EntryStore):
    """The entries under one root directory.

    Args:
        root: the directory; entries lie in a subdirectory named after the schema.
        max_bytes: size from which the least recently used entries are removed; None for no limit.
        read_only: never write, not even to note a use or to put a damaged entry aside.
        shared: let everybody read what is published.
    """

    def __init__(
        self, root: Path, max_bytes: int | None = None, read_only: bool = False, *, shared: bool = False
    ) -> None:
        super().__init__(root, read_only, shared=shared)
        self.max_bytes = max_bytes
        self._unchecked_bytes: int | None = None  #: published since the size was last looked at

    def prune(self, max_bytes: int | None = None, older_than_s: float | None = None) -> PruneReport:
        """Remove what was not used for long, and what is beyond a size: least recently used first.

        For the size, what other compilers and other versions of this package made goes before that.  Entries used or
        made in the last ten minutes are kept.  Damaged entries in quarantine go too.

        Args:
            max_bytes: size to come down to; if neither limit is given, the cache's own.
            older_than_s: remove every entry that was not used for this long.
        """
        if max_bytes is None and older_than_s is None:
            max_bytes = self.max_bytes
        report = self._remove_oldest(self.entries(), max_bytes, older_than_s)
        return report._replace(bytes=report.bytes + self._empty_quarantine())

    def evict(self, max_bytes: int) -> PruneReport:
        """Come down below a size, unless another process of this node is at it."""
        name = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        with try_lock(f"evict-{name}") as free:
            entries = self.entries() if free else []
            if sum(info.disk_bytes for info in entries) > max_bytes:
                return self._remove_oldest(entries, int(max_bytes * LOW_WATER), None)
        return PruneReport((), 0)

    def _remove_oldest(
        self, entries: list[EntryInfo], max_bytes: int | None, older_than_s: float | None
    ) -> PruneReport:
        from megamoe_jit._compile.toolchain import current_builder  # which a listing does without

        doomed = to_remove(entries, max_bytes=max_bytes, older_than_s=older_than_s, current=current_builder())
        return self.remove(info.key for info in doomed)

    def clear(self) -> PruneReport:
        """Delete every entry, readable or not, and what lies in quarantine."""
        for folder in self._inner_folders():
            self._open(folder)
        report = self.remove(self.keys())
        return report._replace(bytes=report.bytes + self._empty_quarantine())

    def verify(self, fix: bool = False) -> list[Problem]:
        """Check every entry as `load` does, its source too, and that it is what its key names.

        Args:
            fix: move what is damaged to quarantine, correct permissions of the cache's directories and unlink what lies
                in the place of one.  Nothing is moved in a cache that belongs to another user.
        """
        fix = fix and not self.read_only
        problems = []
        root = [] if self.read_only else [Path(os.path.realpath(self.root))]
        for folder in chain(root, (self.path,), self._inner_folders()):  # which are seen once that above them is open
            try:
                check_private(folder, self.forbidden)
                if is_closed(folder):
                    mode = stat.S_IMODE(os.lstat(folder).st_mode)
                    raise PermissionError(f"{folder} is closed to its owner (mode {mode:03o})")
            except FileNotFoundError:
                continue
            except OSError as error:
                mend = _put_right if folder.parent == self.path else _take_back
                problems.append(Problem("", folder, str(error), fix and mend(folder)))
        with contextlib.suppress(OSError):
            if os.lstat(self.path).st_uid not in (os.geteuid(), 0):
                return problems
        for key in self.keys():
            folder, flaw = self.entry_path(key), self._flaw(key)
            if isinstance(flaw, Damaged):
                problems.append(Problem(key, folder, str(flaw), fix and self.quarantine(key)))
            elif flaw is not None:
                problems.append(Problem(key, folder, f"cannot be read: {flaw.strerror}", False))
        return problems

    def _inner_folders(self) -> Iterator[Path]:
        """Where the directories that hold entries, and what was an entry, lie or should lie."""
        with contextlib.suppress(OSError):
            yield from (self.path / name for name in sorted(os.listdir(self.path)) if _is_inner(name))

    def _flaw(self, key: str) -> Damaged | OSError | None:
        """What is wrong with an entry, its source too; None if nothing is, or if it is gone."""
        try:
            self.read(key, with_source=True)
        except FileNotFoundError:
            return None
        except (Damaged, OSError) as error:
            return error
        return None

    def survey(self) -> tuple[list[EntryInfo], int]:
        """What `entries` gives, and how many it leaves out because their metadata are damaged.

        Entries of another schema, and those that are removed meanwhile, are not damaged.
        """
        entries, rest = self._survey()
        return entries, sum(self._flaw(key) is not None for key in rest)

    def quarantined(self) -> list[Path]:
        """The damaged entries that were put aside."""
        place = self.path / "quarantine"
        with contextlib.suppress(OSError):
            if is_directory(place):  # what a link leads to is not ours to empty
                return list(place.iterdir())
        return []

    def _empty_quarantine(self) -> int:
        """Delete what lies there; the bytes that gave."""
        sizes = [(path, tree_bytes(path)) for path in self.quarantined()]
        return sum(size for path, size in sizes if self._bury(path))

    def _published(self, size: int) -> None:
        """Evict if the cache may have grown beyond its limit; looks only when that is possible."""
        if self.max_bytes is None:
            return
        unchecked = self._unchecked_bytes
        if unchecked is not None and unchecked + size <= self.max_bytes // 64:
            self._unchecked_bytes = unchecked + size
            return
        self._unchecked_bytes = 0
        report = self.evict(self.max_bytes)
        if report.removed:
            LOG.info("removed %d least recently used kernels from %s", len(report.removed), self.path)


@functools.lru_cache(maxsize=16)
def _cache_at(root: Path, max_bytes: int | None, read_only: bool) -> KernelCache:
    return KernelCache(root, max_bytes, read_only)


def user_cache() -> KernelCache:
    """The cache of the current settings that kernels are written to."""
    settings = get_settings()
    return _cache_at(settings.cache_dir, settings.cache_max_bytes, False)


def readonly_caches() -> tuple[KernelCache, ...]:
    """The read-only caches of the current settings, in the order they are searched."""
    return tuple(_cache_at(root, None, True) for root in get_settings().readonly_cache)


def searched_caches() -> tuple[KernelCache, ...]:
    """The caches of the current settings in the order in which a call searches them."""
    return readonly_caches() if get_settings().no_cache else (*readonly_caches(), user_cache())


def _is_inner(name: str) -> bool:
    """Whether a directory of the cache is called so: the first digits of keys, or the two for what is no entry."""
    return name in (".tmp", "quarantine") or (len(name) == 2 and not set(name) - set("0123456789abcdef"))


def _put_right(folder: Path) -> bool:
    """Take it from others, or unlink it if it is no directory; whether that is enough."""
    return _take_back(folder) if is_directory(folder) else delete(folder)


def _take_back(folder: Path) -> bool:
    """Forbid others to write, and give the owner all; whether that is enough.  Not of shared folders."""
    with contextlib.suppress(OSError):
        mode = os.lstat(folder).st_mode
        if mode & stat.S_ISVTX or not stat.S_ISDIR(mode):
            return False
        os.chmod(folder, (stat.S_IMODE(mode) | 0o700) & ~0o022)
        check_private(folder)
        return True
    return False
