"""From what a user types to the entry: in the user's cache, then in the read-only ones."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megamoe_jit._cli._io import CorruptionError, say
from megamoe_jit._errors import ConfigError, KernelMissingError

if TYPE_CHECKING:
    from megamoe_jit._cache.cache import KernelCache
    from megamoe_jit._cache.entry import EntryInfo
    from megamoe_jit._cache.metadata import Metadata
    from megamoe_jit._jit.lookup import Found

DAMAGE_ADVICE = "`megamoe-jit cache verify --fix` puts it aside, `megamoe-jit warmup` compiles it again"


def own_cache() -> KernelCache:
    """The user's cache.

    Raises:
        OSError: It may not be read, or is no directory; the library takes it for an empty one.
    """
    from megamoe_jit._cache.cache import user_cache

    cache = user_cache()
    for folder in (cache.root, cache.path):
        try:
            status = os.stat(folder)
        except FileNotFoundError:
            continue
        number = 0 if stat.S_ISDIR(status.st_mode) else errno.ENOTDIR
        if not number and not os.access(folder, os.R_OK | os.X_OK):
            number = errno.EACCES
        if number:
            raise OSError(number, os.strerror(number), str(folder))
    return cache


def all_caches() -> list[KernelCache]:
    """The user's cache and the read-only ones."""
    from megamoe_jit._cache.cache import readonly_caches

    return [own_cache(), *readonly_caches()]


def place(cache: KernelCache) -> str:
    """Its directory, and what is special about it."""
    marks = [] if cache.root.is_dir() else ["does not exist"]
    marks += ["read-only"] if cache.read_only else []
    return f"{cache.root} ({', '.join(marks)})" if marks else str(cache.root)


def say_damaged(cache: KernelCache, count: int) -> None:
    """Say how many entries of a cache are left out of what is shown because their metadata are damaged, if any are."""
    if count:
        entries, they, them = ("1 entry", "is", "it") if count == 1 else (f"{count} entries", "are", "them")
        advice = "" if cache.read_only else f"; `megamoe-jit cache verify --fix` puts {them} aside"
        say(f"{entries} in {place(cache)} {they} damaged and left out{advice}")


def find_entries(text: str, *, to_remove: bool = False) -> list[Found]:
    """The entries that a KEY|SPEC means; needs no compiler.

    Args:
        text: the KEY or SPEC.
        to_remove: whether what is not there is not to be compiled either.

    Returns:
        Of a KEY the one.  Of a SPEC all of the kernel, first the one that a call loads, else the likeliest.

    Raises:
        ConfigError: There is none, or a key that is cut short fits several.
        KernelMissingError: The kernel of a SPEC is not cached; names the warmup command.
    """
    from megamoe_jit._cache.entry import Damaged
    from megamoe_jit._cli._names import looks_like_key, parse_spec
    from megamoe_jit._jit.kernel import warmup_command
    from megamoe_jit._jit.lookup import entries_of, find_key, first_whole

    caches = all_caches()
    if looks_like_key(text):
        return [find_key(text, caches)]
    spec = parse_spec(text)
    found = entries_of(spec, caches)
    if not found:
        step = "`megamoe-jit cache ls` lists the kernels" if to_remove else f"run: {warmup_command(spec)}"
        places = ", ".join(str(each.path) for each in caches)
        raise KernelMissingError(f"kernel {spec.kernel_name} is not in the cache {places}; {step}")
    try:
        chosen = first_whole((each for each in found if each.fit is found[0].fit), with_source=False)
    except (Damaged, OSError):
        chosen = found[0]
    return sorted(found, key=lambda each: each is not chosen)


def entry_info(found: Found) -> EntryInfo:
    """What the metadata of an entry says.

    Raises:
        CorruptionError: It cannot be read.
    """
    if found.info is None:
        raise CorruptionError(f"cached kernel {found.path} is damaged: it has no readable metadata; {DAMAGE_ADVICE}")
    return found.info


def others(found: Sequence[Found]) -> list[Found]:
    """All but the first; copies in several caches are one."""
    return list({each.key: each for each in found if each.key != found[0].key}.values())


def fit_note(found: Sequence[Found]) -> str:
    """What to say beside the first entry of a SPEC: whether calls load it, and which others there are."""
    from megamoe_jit._jit.lookup import Fit

    rest, loads = others(found), found[0].fit is Fit.LOADS
    if loads and not rest:
        return ""
    note = "calls try this one first" if loads else f"calls do not load it: {found[0].fit.reason}"
    return f"{note}; also cached: {_listed(rest)}" if rest else note


def _listed(found: Sequence[Found]) -> str:
    return ", ".join(f"{each.key[:12]} (NVRTC {each.info.compiler if each.info else '?'})" for each in found)


def load_entry(prefix: str) -> tuple[bytes, str, Metadata]:
    """Cubin, source and metadata of the cached kernel of a KEY, verified.

    Raises:
        ConfigError: There is no such key.
        CorruptionError: The entry is damaged.
    """
    from megamoe_jit._cache.entry import CUBIN, SOURCE, Damaged, read_entry

    (found,) = find_entries(prefix)
    try:
        files, meta = read_entry(found.key, found.path, found.cache.forbidden, with_source=True)
    except Damaged as damage:
        raise CorruptionError(f"cached kernel {found.path} is damaged: {damage}; {DAMAGE_ADVICE}") from None
    except OSError as error:
        raise ConfigError(f"cached kernel {found.path} cannot be read: {error.strerror}") from error
    return files[CUBIN], files[SOURCE].decode(), meta


def whole_keys(texts: tuple[str, ...]) -> list[str]:
    """The keys in the user's cache that these KEY|SPECs mean, each once.

    Raises:
        ConfigError: One fits none or several, or a kernel that only a read-only cache has.
        KernelMissingError: The kernel of a SPEC is not cached.
    """
    keys: dict[str, None] = {}
    for text in texts:
        found = find_entries(text, to_remove=True)
        best = [each for each in found if each.fit is found[0].fit]
        own = [each for each in best if not each.cache.read_only]
        if not own:
            where = best[0].cache.path
            raise ConfigError(f"{text!r} is in the read-only cache {where}, from which nothing is removed")
        if len(own) > 1:
            where = own[0].cache.path
            raise ConfigError(f"{text!r} is {len(own)} times in the cache {where}; name a key: {_listed(own)}")
        keys[own[0].key] = None
    return list(keys)
