"""Which entries of the caches a spec or a key means: `lookup` has them in the order in which a call tries them.

Calls, `explain`, `--dry-run`, `export_pack`, `cache rm` and `inspect` all take what comes first here; they differ in
what they do with it. Nothing is used here, and nothing put aside if damaged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from megamoe_jit._cache.cache import KernelCache, searched_caches
from megamoe_jit._cache.entry import Damaged, EntryInfo, by_compiler, read_info
from megamoe_jit._cache.identity import cache_key, source_id
from megamoe_jit._cache.metadata import Metadata
from megamoe_jit._compile.render import RenderedSource, render
from megamoe_jit._compile.toolchain import ARCH, Toolchain, find_toolchain, options_for
from megamoe_jit._errors import ConfigError, ToolchainError
from megamoe_jit._spec.compilable import Compilable
from megamoe_jit._text import shown
from megamoe_jit._trust import check_private

LOG = logging.getLogger("megamoe_jit")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to look for: the exact kernel if there is a compiler to say which, its source in any case."""

    spec: Compilable
    source: RenderedSource
    source_id: str
    toolchain: Toolchain | None
    key: str | None
    problem: ToolchainError | None

    @classmethod
    def of(cls, spec: Compilable) -> Wanted:
        """Renders it and identifies the compiler.

        Raises:
            RenderError: its source cannot be rendered.
        """
        source = render(spec)
        toolchain, key, problem = None, None, None
        try:
            toolchain = find_toolchain()
        except ToolchainError as error:  # kernels that others compiled may do
            problem = error
        options = options_for(toolchain)
        if toolchain is not None:
            key = cache_key(source.text, options, spec.kernel_name, ARCH, toolchain.release, toolchain.build)
        return cls(spec, source, source_id(source.text, options, spec.kernel_name, ARCH), toolchain, key, problem)

    @property
    def major(self) -> int | None:
        """CUDA major version of the compiler, if there is one."""
        return self.toolchain.version[0] if self.toolchain else None


class Fit(IntEnum):
    """How well an entry fits a spec."""

    NAME = 0  #: the kernel's name: compiled from another source or with other options
    SOURCE = 1  #: the same source, but neither compiled by the NVRTC that is found here nor handed over
    LOADS = 2  #: a call loads it, unless it is damaged

    @property
    def reason(self) -> str:
        """Why calls do not load such an entry; empty if they do."""
        if self is Fit.LOADS:
            return ""
        if self is Fit.SOURCE:
            return "the NVRTC that is found here did not compile it, and it was not imported"
        return "another version of this package compiled it, or other options"


@dataclass(frozen=True, slots=True)
class Found:
    """An entry of a cache.

    Attributes:
        cache: where it lies.
        key: its name.
        info: what its metadata says; None if that cannot be read, for it is damaged, or was not read yet.
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

    @property
    def entry(self) -> str:
        """Symbol of its kernel; empty if that is not known."""
        return self.info.entry if self.info else ""


def lookup(wanted: Wanted, caches: Iterable[KernelCache] | None = None, least: Fit = Fit.NAME) -> Iterator[Found]:
    """Every entry of a kernel, those that a call loads first, in the order in which it tries them.

    The first are those of the very key, one a cache, whether they are there or not: nothing is read before they have
    been tried.

    Args:
        wanted: the kernel.
        caches: in any order, but read-only ones among themselves as they are searched; those of a call if None.
        least: what fits less well is not looked for.
    """
    places = list(searched_caches() if caches is None else sorted(caches, key=lambda each: not each.read_only))
    for cache in places:
        if wanted.key is not None:
            yield Found(cache, wanted.key, None, Fit.LOADS)
    for cache in places:
        for info in cache.of_source(wanted.source_id, wanted.major):
            if info.key != wanted.key:
                yield Found(cache, info.key, info, Fit.LOADS)
    if least is Fit.LOADS:
        return
    rest = list[Found]()
    for cache in places:
        for info in by_compiler(cache.entries(), wanted.major):
            rest.append(Found(cache, info.key, info, fit_of(wanted, info.key, info.meta, cache)))
    yield from (each for each in rest if each.fit is Fit.SOURCE)
    if least is Fit.NAME:
        named = [each for each in rest if each.fit is Fit.NAME and each.entry == wanted.spec.kernel_name]
        yield from sorted(named, key=lambda each: each.info.created_at if each.info else "", reverse=True)


def fit_of(wanted: Wanted, key: str, meta: Metadata, cache: KernelCache) -> Fit:
    """How well an entry of a cache fits."""
    if key == wanted.key:
        return Fit.LOADS
    if meta.get("source_id") != wanted.source_id:
        return Fit.NAME
    return Fit.LOADS if cache.handed_over(key) else Fit.SOURCE


def find_key(prefix: str, caches: Sequence[KernelCache]) -> Found:
    """The one entry whose key begins with `prefix`, in the first of these caches that has it.

    Raises:
        ConfigError: there is none, or there are several.
    """
    begins = prefix.strip().lower()
    every = {cache: cache.keys() for cache in caches}
    held = [(cache, key) for cache, keys in every.items() for key in keys if begins and key.startswith(begins)]
    fitting = sorted({key for _, key in held})
    where = " or ".join(str(cache.path) for cache in caches)
    if len(fitting) > 1:
        first = ", ".join(key[: max(12, len(prefix) + 4)] for key in fitting[:5])
        raise ConfigError(f"key {prefix!r} is not unique in {where}: {first}{', ...' if fitting[5:] else ''}")
    found = filter(None, (_at(cache, key) for cache, key in held))
    chosen = min(found, key=lambda each: each.info is None, default=None)  # the first that is not damaged, if one is
    if chosen is None:
        what = "has no readable metadata" if held else "is not"
        raise ConfigError(f"key {shown(prefix)} {what} in the cache {where}; `megamoe-jit cache ls` lists the keys")
    return chosen


def entries_of(spec: Compilable, caches: Iterable[KernelCache]) -> list[Found]:
    """What `lookup` has of a kernel and is there.

    Needs no compiler: without one, entries are found by their source and by the kernel's name.

    Raises:
        RenderError: its source cannot be rendered.
    """
    found = lookup(Wanted.of(spec), caches)
    there = (each if each.info is not None else _at(each.cache, each.key, each.fit) for each in found)
    return [each for each in there if each is not None]


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
            each.cache.read(each.key, with_source=with_source)
        except (Damaged, OSError) as problem:
            failed.append((each, problem))
            continue
        for other, reason in failed:
            LOG.warning("cached kernel %s is passed over: %s", other.path, reason)
        return each
    raise failed[0][1]


def _at(cache: KernelCache, key: str, fit: Fit = Fit.NAME) -> Found | None:
    """The entry of this key, damaged or not; None for one of another schema, or that went meanwhile."""
    info = read_info(key, str(cache.entry_path(key)))
    if info is None:
        try:
            cache.read(key)
        except Damaged:
            return Found(cache, key, None, fit)
        except OSError:
            pass
        return None
    return Found(cache, key, info, fit)
