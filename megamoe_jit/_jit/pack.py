"""Packs: compiled kernels in one tar file, to build where there is no GPU and ship to where there is.

The first member, ``manifest.json``, holds the sha256 and the size of every other: ``entries/<key>/`` with the three
files of an entry. Reading believes nothing: names, sizes and digests must be those of the manifest, an entry must
verify as one in the cache does, and nothing is written before it has. The same kernels give the same bytes, wherever
and whenever they were compiled: what is known of that machine stays there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megamoe_jit._cache.cache import KernelCache, readonly_caches, user_cache
from megamoe_jit._cache.entry import IMPORTED, META, Damaged
from megamoe_jit._cache.metadata import SCHEMA, Metadata, dump_metadata
from megamoe_jit._errors import ConfigError, KernelMissingError, PackError
from megamoe_jit._files import file_sha256
from megamoe_jit._jit.kernel import warmup_command
from megamoe_jit._jit.lookup import Fit, Found, entries_of, find_key, first_whole
from megamoe_jit._jit.pack_file import FILES, KIND, entries_in, opened, sha256, write_tar
from megamoe_jit._spec.checks import check
from megamoe_jit._spec.compilable import Compilable
from megamoe_jit._spec.kinds import AnySpec
from megamoe_jit._text import items_of, one_line, shown
from megamoe_jit._version import __version__


@dataclass(frozen=True, slots=True)
class PackInfo:
    """A pack.

    Attributes:
        path: the file.
        keys: its kernels.
        kernels: their symbols, in the same order.
        bytes: size of the file.
        sha256: digest of the file.
        package_version: the version that wrote it.
    """

    path: Path
    keys: tuple[str, ...]
    kernels: tuple[str, ...]
    bytes: int
    sha256: str
    package_version: str


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did.

    Attributes:
        root: the cache that the pack was imported into.
        imported: keys of the kernels that were not there before.
        present: keys of those that were, which stay as they are.
        bytes: size of the files of `imported`.
    """

    root: Path
    imported: tuple[str, ...]
    present: tuple[str, ...]
    bytes: int


def export_pack(
    path: Path | str, what: Iterable[str | Compilable] | None = None, cache: KernelCache | None = None
) -> PackInfo:
    """Write kernels of the cache into one file.

    Args:
        path: the file, replaced if it exists; compressed if its name ends in `.gz` or `.tgz`.
        what: keys, beginnings of keys, or specs, which mean the kernel that a call would load, else one that another
            compiler built from the same source; everything there is if None.
        cache: where to take them from; the user's cache and the read-only ones if None.

    Returns:
        What was written: `path`, `keys` and `kernels` (their symbols, in the same order), `bytes` and `sha256` of the
        file, and `package_version`.

    Raises:
        ConfigError: a key is not in the cache, or not unique; or an argument is none of these.
        KernelMissingError: the kernel of a spec is not in the cache; names the warmup command.
        PackError: there is nothing to write, an entry is damaged, or the file cannot be written.
    """
    target = _path("path", path)
    if os.path.lexists(target) and not target.is_file():
        raise PackError(f"cannot write {target}: it is not a plain file, and would be replaced by one")
    files: dict[str, dict[str, bytes]] = {}
    kernels: dict[str, str] = {}
    for key, place in sorted(_chosen(what, cache).items()):
        try:
            contents, meta = place.read(key, with_source=True)
        except (OSError, Damaged) as problem:
            if what is None and isinstance(problem, FileNotFoundError):
                continue  # removed meanwhile, or of another version, which calls and listings pass over too
            raise PackError(f"cannot export {place.entry_path(key)}: {problem}") from None
        files[key] = {**{name: contents[name] for name in FILES}, META: _without_origin(meta)}
        kernels[key] = meta["entry"]
    if not files:
        where = " or ".join(str(each.root) for each in _caches(cache))
        raise PackError(f"there are no kernels to export in {where}; `megamoe-jit warmup` compiles some")
    entries = {
        key: {
            "kernel": kernels[key],
            "files": {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in contents.items()},
        }
        for key, contents in files.items()
    }
    manifest = {"kind": KIND, "schema": SCHEMA, "package_version": __version__, "entries": entries}
    try:
        digest = write_tar(target, json.dumps(manifest, indent=1, sort_keys=True).encode(), files)
        size = target.stat().st_size
    except OSError as error:
        raise PackError(f"cannot write {target}: {error.strerror}") from error
    return PackInfo(target, tuple(sorted(files)), tuple(kernels[k] for k in sorted(files)), size, digest, __version__)


def import_pack(path: Path | str, root: Path | str | None = None) -> ImportReport:
    """Put the kernels of a pack into a cache; all of the pack is verified first.

    Args:
        path: the file.
        root: a directory to fill, for use as a read-only cache, and readable by everybody, so that an image can be
            built by one user and used by another; the user's cache if None.

    Returns:
        What was imported: `root`, the cache; keys `imported`, and `present` of kernels that were there before; `bytes`
        of the files that were written.  Imported kernels are used even where another compiler is installed, or none.

    Raises:
        ConfigError: an argument is no path.
        PackError: the pack is damaged, foreign or not to be trusted, or the cache cannot be written.
    """
    source = _path("path", path)
    cache = user_cache() if root is None else KernelCache(_path("root", root).absolute(), shared=True)
    with opened(source) as (archive, manifest):
        for _ in entries_in(source, archive, manifest):
            pass
    mark = {IMPORTED: os.fsencode(source.name) + b"\n"}
    imported, present, size = [], [], 0
    with opened(source) as (archive, again):
        if again != manifest:
            raise PackError(f"{source} changed while it was read")
        for key, files in entries_in(source, archive, again):
            if cache.load(key) is not None:
                present.append(key)
            elif cache.publish(key, {**files, **mark}):
                imported.append(key)
                size += sum(map(len, files.values()))
            else:
                raise PackError(f"cannot import {source}: the cache {cache.path} cannot be written")
    return ImportReport(cache.root, tuple(imported), tuple(present), size)


def read_pack(path: Path | str) -> PackInfo:
    """Verify a pack and say what is in it.

    Raises:
        PackError: it is damaged, foreign or not to be trusted.
    """
    source = _path("path", path)
    with opened(source) as (archive, manifest):
        keys = tuple(key for key, _ in entries_in(source, archive, manifest))
    kernels = tuple(manifest["entries"][key]["kernel"] for key in keys)
    version = one_line(str(manifest.get("package_version", "")))
    return PackInfo(source, keys, kernels, source.stat().st_size, file_sha256(source), version)


def _path(name: str, value: object) -> Path:
    """A path that somebody has named: an empty one would mean the working directory."""
    text = os.fsdecode(value) if isinstance(value, str | os.PathLike) else ""
    check(bool(text) and "\0" not in text, name, value, "the path of a file or directory")
    return Path(text)


def _without_origin(meta: Metadata) -> bytes:
    """Metadata for other machines: not when, where and how fast it was compiled."""
    kept = {name: value for name, value in meta.items() if name not in ("created_at", "host", "compile_ms")}
    if "nvrtc" in kept:
        kept["nvrtc"] = {name: value for name, value in meta["nvrtc"].items() if name != "path"}
    return dump_metadata(kept)


def _caches(cache: KernelCache | None) -> tuple[KernelCache, ...]:
    check(isinstance(cache, KernelCache | None), "cache", cache, "a KernelCache, or None")
    return (user_cache(), *readonly_caches()) if cache is None else (cache,)


def _chosen(what: Iterable[str | Compilable] | None, cache: KernelCache | None) -> dict[str, KernelCache]:
    """Where what is to be exported lies, by key."""
    caches = _caches(cache)
    found: dict[str, KernelCache] = {}
    if what is None:
        for each in reversed(caches):  # what several have comes from the first
            found.update(dict.fromkeys(each.keys(), each))  # those too whose metadata cannot be read
        return found
    several = items_of(what)
    for item in [what] if several is None else several:
        if not isinstance(item, str | AnySpec):
            raise ConfigError(f"what: {shown(item)} given; allowed: keys and KernelSpecs")
        entry = find_key(item, caches) if isinstance(item, str) else _of_spec(item, caches)
        found[entry.key] = entry.cache
    return found


def _of_spec(spec: Compilable, caches: tuple[KernelCache, ...]) -> Found:
    entries = entries_of(spec, caches)
    usable = [each for each in entries if each.fit > Fit.NAME]
    if not usable:
        what = "is in the cache only as compiled from another source" if entries else "is not in the cache"
        raise KernelMissingError(f"kernel {spec.kernel_name} {what}; run: {warmup_command(spec)}")
    try:
        return first_whole(usable, with_source=True)
    except (OSError, Damaged) as problem:
        raise PackError(f"cannot export {usable[0].path}: {problem}") from None
