"""From what a user types to the entry: in the user's cache, then in the read-only ones."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from megamoe_jit._cli._io import CorruptionError
from megamoe_jit._errors import ConfigError, KernelMissingError

if TYPE_CHECKING:
    from megamoe_jit._cache import EntryInfo, KernelCache

__all__ = ["all_caches", "entry_document", "find_entry", "load_entry", "own_cache", "place", "whole_keys"]


def own_cache() -> KernelCache:
    """The user's cache.

    Raises:
        PermissionError: It is there and may not be read, which the library takes for an empty one.
    """
    from megamoe_jit._cache import user_cache

    cache = user_cache()
    for folder in (cache.root, cache.path):
        if os.path.exists(folder) and not os.access(folder, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return cache


def all_caches() -> list[KernelCache]:
    """The user's cache and the read-only ones."""
    from megamoe_jit._cache import readonly_caches

    return [own_cache(), *readonly_caches()]


def place(cache: KernelCache) -> str:
    """Its directory, and what is special about it."""
    marks = [] if cache.root.is_dir() else ["does not exist"]
    marks += ["read-only"] if cache.read_only else []
    return f"{cache.root} ({', '.join(marks)})" if marks else str(cache.root)


def find_entry(text: str) -> tuple[KernelCache, EntryInfo]:
    """The one entry that a KEY|SPEC means, and the cache it is in.

    Raises:
        ConfigError: There is none, or a key that is cut short fits several.
        KernelMissingError: The kernel of a SPEC is not cached; names the warmup command.
    """
    from megamoe_jit._cache import find_info
    from megamoe_jit._cli._options import looks_like_key, parse_spec
    from megamoe_jit._runtime import kernel_key, warmup_command

    caches = all_caches()
    if looks_like_key(text):
        return find_info(text, caches)
    spec = parse_spec(text)
    key = kernel_key(spec)
    if not any(cache.holds(key) for cache in caches):
        raise KernelMissingError(f"kernel {spec.entry} is not in the cache; run: {warmup_command(spec)}")
    return find_info(key, caches)


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


def whole_keys(texts: tuple[str, ...]) -> list[str]:
    """The keys in the user's cache that these KEY|SPECs mean, each once.

    Raises:
        ConfigError: One fits none or several, or a kernel that only a read-only cache has.
        KernelMissingError: The kernel of a SPEC is not cached.
    """
    keys: dict[str, None] = {}
    for text in texts:
        cache, info = find_entry(text)
        if cache.read_only:
            raise ConfigError(f"{text!r} is in the read-only cache {cache.path}, from which nothing is removed")
        keys[info.key] = None
    return list(keys)


def entry_document(info: EntryInfo) -> dict[str, Any]:
    """An entry for a JSON document."""
    from datetime import UTC, datetime

    used = datetime.fromtimestamp(info.used_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {**info.to_json(), "used_at": used}
