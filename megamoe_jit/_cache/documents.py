"""What the JSON documents about caches say: where they are, what is in them, what was removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megamoe_jit._cache.cache import KernelCache, Problem
from megamoe_jit._cache.entry import EntryInfo
from megamoe_jit._cache.trees import tree_bytes
from megamoe_jit._documents import Count, Digest, Document, Figure, SpecData, Time, time_of


@dataclass(frozen=True, slots=True)
class CachePath(Document):
    """Where the cache is."""

    KIND = "cache-path"

    path: str
    exists: bool


@dataclass(frozen=True, slots=True)
class Compiler:
    """The NVRTC that made a kernel.

    Attributes:
        path: absent of an imported kernel.
    """

    version: str
    build: str
    path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A cached kernel: what its metadata say, as far as whoever wrote them knew it, and what the file system adds."""

    advisories: list[str] | None = None
    arch: str | None = None
    compile_ms: dict[str, Figure] | None = None
    created_at: Time | None = None
    cubin_bytes: Count | None = None
    cubin_sha256: Digest | None = None
    diagnostics: Count | None = None
    dynamic_shared_bytes: Count | None = None
    entry: str | None = None
    files: list[str] | None = None
    host: str | None = None
    key: Digest
    max_threads: Count | None = None
    nvrtc: Compiler | None = None
    options: list[str] | None = None
    package_version: str | None = None
    param_bytes: Count | None = None
    registers: Count | None = None
    schema: Count | None = None
    source_bytes: Count | None = None
    source_id: Digest | None = None
    source_sha256: Digest | None = None
    spec: SpecData | None = None
    spill_bytes: Count | None = None
    stack_bytes: Count | None = None
    static_shared_bytes: Count | None = None
    path: str
    used_at: Time
    disk_bytes: Count

    @classmethod
    def known(cls, info: EntryInfo) -> dict[str, Any]:
        """The fields for an entry, by name."""
        meta = {name: value for name, value in info.meta.items() if name in cls.__dataclass_fields__}
        if "nvrtc" in meta:
            made_by = info.meta["nvrtc"]
            meta["nvrtc"] = Compiler(made_by.get("version", ""), made_by.get("build", ""), made_by.get("path"))
        beside = {"path": str(info.path), "used_at": time_of(info.used_at), "disk_bytes": info.disk_bytes}
        return {**meta, "key": info.key, **beside}

    @classmethod
    def of(cls, info: EntryInfo) -> Entry:
        """What is known of an entry."""
        return cls(**cls.known(info))


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedEntry(Entry):
    """One kernel of a listing.

    Attributes:
        read_only: whether it is in a read-only cache
    """

    read_only: bool


@dataclass(frozen=True, slots=True)
class CacheListing(Document):
    """The compiled kernels, those of the read-only caches too, oldest first.

    Attributes:
        path: the user's own cache
        disk_bytes: size of the kernels in the user's own cache
        damaged: entries that are left out because their metadata are damaged, those of the read-only caches too
    """

    KIND = "cache-ls"

    path: str
    disk_bytes: Count
    damaged: Count
    entries: tuple[ListedEntry, ...]


@dataclass(frozen=True, slots=True)
class CacheInfo(Document):
    """All that is known of one kernel.

    Attributes:
        others: further entries of a kernel that was named by its SPEC
    """

    KIND = "cache-info"

    entry: Entry
    others: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Numbers about one cache.

    Attributes:
        damaged: entries whose metadata are damaged, which count nowhere else
        limit_bytes: size from which entries are evicted
        quarantined: damaged entries kept aside
        oldest_use: last use of the entry that would be evicted first
        newest_use: last use of the entry that would be evicted last
    """

    path: str
    read_only: bool
    entries: Count
    damaged: Count
    bytes: Count
    limit_bytes: Count | None
    quarantined: Count
    quarantined_bytes: Count
    oldest_use: Time | None
    newest_use: Time | None

    @classmethod
    def of(cls, cache: KernelCache) -> Statistics:
        """Those of a cache as it is now."""
        entries, damaged = cache.survey()
        used, aside = [info.used_at for info in entries], cache.quarantined()
        return cls(
            path=str(cache.root),
            read_only=cache.read_only,
            entries=len(entries),
            damaged=damaged,
            bytes=sum(info.disk_bytes for info in entries),
            limit_bytes=cache.max_bytes,
            quarantined=len(aside),
            quarantined_bytes=sum(map(tree_bytes, aside)),
            oldest_use=time_of(min(used)) if used else None,
            newest_use=time_of(max(used)) if used else None,
        )


@dataclass(frozen=True, slots=True)
class CacheStatistics(Document):
    """Size and use of the cache and of the read-only ones."""

    KIND = "cache-stats"

    caches: tuple[Statistics, ...]


@dataclass(frozen=True, slots=True)
class Wrong:
    """Something that is wrong with a cache.

    Attributes:
        key: null for a problem of the cache as a whole
        fixed: whether it was mended
        cache: its directory
    """

    key: Digest | None
    path: str
    message: str
    fixed: bool
    cache: str

    @classmethod
    def of(cls, problem: Problem, cache: KernelCache) -> Wrong:
        """A problem that a cache found."""
        return cls(problem.key or None, str(problem.path), problem.message, problem.fixed, str(cache.root))


@dataclass(frozen=True, slots=True)
class CacheVerify(Document):
    """What is wrong with the caches.

    Attributes:
        entries: kernels with readable metadata
    """

    KIND = "cache-verify"

    entries: Count
    problems: tuple[Wrong, ...]
    unfixed: Count


@dataclass(frozen=True, slots=True)
class CachePrune(Document):
    """What was removed, or would be.

    Attributes:
        not_removed: Kernels that were to go and could not be removed.
        kept_recent: Kernels that would go as well, had they not been used in the last ten minutes.
    """

    KIND = "cache-prune"

    path: str
    dry_run: bool
    removed: tuple[Digest, ...]
    not_removed: tuple[Digest, ...]
    bytes: Count
    kept_recent: Count


@dataclass(frozen=True, slots=True)
class CacheRemoval(Document):
    """What was removed."""

    KIND = "cache-rm"

    path: str
    removed: tuple[Digest, ...]
    bytes: Count


@dataclass(frozen=True, slots=True)
class CacheClear(CacheRemoval):
    """What was removed."""

    KIND = "cache-clear"
