"""From what a user types of a key to the entry: in the user's cache, then in the read-only ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megamoe_jit._cli._io import CorruptionError
from megamoe_jit._errors import ConfigError

if TYPE_CHECKING:
    from megamoe_jit._cache import EntryInfo, KernelCache

__all__ = ["all_caches", "entry_document", "find_entry", "load_entry", "whole_keys"]


def all_caches() -> list[KernelCache]:
    """The user's cache and the read-only ones."""
    from megamoe_jit._cache import readonly_caches, user_cache

    return [user_cache(), *readonly_caches()]


def find_entry(prefix: str) -> tuple[KernelCache, EntryInfo]:
    """The one entry whose key begins with `prefix`, and the cache it is in.

    Raises:
        ConfigError: There is none, or there are several.
    """
    from megamoe_jit._cache import find_info

    return find_info(prefix, all_caches())


def load_entry(prefix: str) -> tuple[bytes, str, dict[str, Any]]:
    """Cubin, source and metadata of a cached kernel, verified.

    Raises:
        ConfigError: There is no such key.
        CorruptionError: The entry is damaged.
    """
    from megamoe_jit._entry import CUBIN, SOURCE, Damaged, read_entry

    cache, info = find_entry(prefix)
    try:
        files, meta = read_entry(info.key, info.path, cache.forbidden, with_source=True)
    except Damaged as damage:
        advice = "`megamoe-jit cache verify --fix` puts it aside"
        raise CorruptionError(f"cached kernel {info.path} is damaged: {damage}; {advice}") from None
    except OSError as error:
        raise ConfigError(f"cached kernel {info.path} cannot be read: {error.strerror}") from error
    return files[CUBIN], files[SOURCE].decode(), meta


def whole_keys(prefixes: tuple[str, ...]) -> list[str]:
    """The keys in the user's cache that these prefixes begin, each once.

    Raises:
        ConfigError: A prefix fits none or several, or a kernel that only a read-only cache has.
    """
    keys: dict[str, None] = {}
    for prefix in prefixes:
        cache, info = find_entry(prefix)
        if cache.read_only:
            raise ConfigError(f"key {prefix!r} is in the read-only cache {cache.path}, from which nothing is removed")
        keys[info.key] = None
    return list(keys)


def entry_document(info: EntryInfo) -> dict[str, Any]:
    """An entry for a JSON document."""
    from datetime import UTC, datetime

    used = datetime.fromtimestamp(info.used_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {**info.to_json(), "used_at": used}
