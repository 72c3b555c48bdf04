"""Which entries a key or a spec means: found as a call finds them, but neither used nor put aside if damaged."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from megamoe_jit._cache.cache import KernelCache, find_info
from megamoe_jit._cache.entry import Damaged, EntryInfo, by_compiler, read_entry, read_info
from megamoe_jit._errors import ConfigError
from megamoe_jit._jit.obtain import Wanted
from megamoe_jit._spec.kinds import Spec
from megamoe_jit._trust import check_private

__all__ = ["Fit", "Found", "entries_of", "find_key", "first_whole"]

LOG = logging.getLogger("megamoe_jit")


class Fit(IntEnum):
    """How well an entry fits a spec."""

    NAME = 0  #: the kernel's name: compiled from another source or with other options
    SOURCE = 1  #: the same source, but neither compiled by the NVRTC that is found here nor handed over
    LOADS = 2  #: a call loads it, unless it is damaged


@dataclass(frozen=True, slots=True)
class Found:
    """An entry of a cache.

    Attributes:
        cache: where it lies.
        key: its name.
        info: what its metadata says; None if that cannot be read, for it is damaged.
        fit: how well it fits the spec that it was looked up by.
    """

    cache: KernelCache
    key: str
    info: EntryInfo | None
    fit: Fit = Fit.NAME

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.cache.entry_path(self.key)


def find_key(prefix: str, caches: Sequence[KernelCache]) -> Found:
    """The one entry whose key begins with `prefix`, in the first of these caches that has it.

    Raises:
        ConfigError: there is none, or there are several.
    """
    try:
        cache, info = find_info(prefix, caches)
    except ConfigError:
        begins = prefix.strip().lower()
        keys = {each: each.keys() for each in caches}
        held = [(each, key) for each in caches for key in keys[each] if begins and key.startswith(begins)]
        found = next(filter(None, (_at(each, key) for each, key in held)), None)
        if found is None or len({key for _, key in held}) > 1:
            raise
        return found
    return Found(cache, info.key, info)


def entries_of(spec: Spec, caches: Iterable[KernelCache]) -> list[Found]:
    """Every entry of a kernel, those that a call loads first, in the order in which it tries them.

    Needs no compiler: without one, entries are found by their source and by the kernel's name.

    Args:
        spec: the kernel.
        caches: in any order, but read-only ones among themselves as they are searched.

    Raises:
        RenderError: its source cannot be rendered.
    """
    wanted = Wanted.of(spec)
    exact: list[Found] = []
    handed_over: list[Found] = []
    compiled: list[Found] = []
    named: list[tuple[str, Found]] = []
    for cache in sorted(caches, key=lambda each: not each.read_only):  # as a call searches them
        if wanted.key is not None and cache.holds(wanted.key):
            exact.extend(filter(None, [_at(cache, wanted.key, Fit.LOADS)]))
        for info in by_compiler((info for info in cache.entries() if info.key != wanted.key), wanted.major):
            if info.meta.get("source_id") != wanted.source_id:
                if info.entry == spec.entry:
                    named.append((info.created_at, Found(cache, info.key, info, Fit.NAME)))
            elif cache.handed_over(info.key):
                handed_over.append(Found(cache, info.key, info, Fit.LOADS))
            else:
                compiled.append(Found(cache, info.key, info, Fit.SOURCE))
    named.sort(key=lambda row: row[0], reverse=True)
    return [*exact, *handed_over, *compiled, *(found for _, found in named)]


def first_whole(found: Iterable[Found], *, with_source: bool) -> Found:
    """The first entry that may be used; a warning names those that were passed over.

    Args:
        found: one or more.
        with_source: whether the source beside the kernel counts too; a call does without.

    Raises:
        Damaged: the first must not be used, and no other may.
        OSError: the first cannot be read, or lies in a cache that others can write, and no other may be used.
    """
    failed: list[tuple[Found, Damaged | OSError]] = []
    for each in found:
        try:
            check_private(each.cache.path, each.cache.forbidden)
            read_entry(each.key, each.path, each.cache.forbidden, with_source=with_source)
        except (Damaged, OSError) as problem:
            failed.append((each, problem))
            continue
        for other, reason in failed:
            LOG.warning("cached kernel %s is passed over: %s", other.path, reason)
        return each
    raise failed[0][1]


def _at(cache: KernelCache, key: str, fit: Fit = Fit.NAME) -> Found | None:
    """The entry of this key, damaged or not; None for one of another schema, or that went meanwhile."""
    folder = cache.entry_path(key)
    info = read_info(key, str(folder))
    if info is None:
        try:
            read_entry(key, folder, cache.forbidden)
        except Damaged:
            return Found(cache, key, None, fit)
        except OSError:
            pass
        return None
    return Found(cache, key, info, fit)
