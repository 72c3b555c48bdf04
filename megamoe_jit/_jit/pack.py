"""Packs: compiled kernels in one tar file, to build where there is no GPU and ship to where there is.

The first member, ``manifest.json``, holds the sha256 and the size of every other: ``entries/<key>/`` with the three
files of an entry. Reading believes nothing: names, sizes and digests must be those of the manifest, an entry must
verify as one in the cache does, and nothing is written before it has. The same kernels give the same bytes, wherever
and whenever they were compiled: what is known of that machine stays there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megamoe_jit._cache.cache import KernelCache, readonly_caches, user_cache
from megamoe_jit._cache.entry import (
    CUBIN,
    IMPORTED,
    LIMIT,
    META,
    SCHEMA,
    SOURCE,
    Damaged,
    is_key,
    read_entry,
    verify_files,
)
from megamoe_jit._errors import ConfigError, KernelMissingError, PackError
from megamoe_jit._jit.lookup import Fit, Found, entries_of, find_key, first_whole
from megamoe_jit._spec import KernelSpec
from megamoe_jit._version import __version__

__all__ = ["ImportReport", "PackInfo", "export_pack", "import_pack", "read_pack"]

KIND = "megamoe-jit-pack"
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 32 << 20
PACK_LIMIT = 4 << 30  #: bytes of all files of a pack together
_FILES = (CUBIN, META, SOURCE)
_MEMBER = re.compile(r"entries/([0-9a-f]{64})/(" + "|".join(map(re.escape, _FILES)) + ")")


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
    path: Path | str, what: Iterable[str | KernelSpec] | None = None, cache: KernelCache | None = None
) -> PackInfo:
    """Write kernels of the cache into one file.

    Args:
        path: the file, replaced if it exists; compressed if its name ends in `.gz` or `.tgz`.
        what: keys, beginnings of keys, or specs, which mean the kernel that a call would load, else one that another
            compiler built from the same source; everything there is if None.
        cache: where to take them from; the user's cache and the read-only ones if None.

    Returns:
        What was written.

    Raises:
        ConfigError: a key is not in the cache, or not unique.
        KernelMissingError: the kernel of a spec is not in the cache; names the warmup command.
        PackError: there is nothing to write, an entry is damaged, or the file cannot be written.
    """
    target = Path(path)
    files: dict[str, dict[str, bytes]] = {}
    kernels: dict[str, str] = {}
    for key, folder, forbidden in _chosen(what, cache):
        try:
            contents, meta = read_entry(key, folder, forbidden, with_source=True)
        except (OSError, Damaged) as problem:
            if what is None and isinstance(problem, FileNotFoundError):
                continue  # removed meanwhile
            raise PackError(f"cannot export {folder}: {problem}") from None
        if meta["schema"] != SCHEMA:
            continue  # of another version, which calls and listings pass over too
        files[key] = {**{name: contents[name] for name in _FILES}, META: _without_origin(meta)}
        kernels[key] = str(meta.get("entry", ""))
    if not files:
        where = " or ".join(str(each.root) for each in _caches(cache))
        raise PackError(f"there are no kernels to export in {where}; `megamoe-jit warmup` compiles some")
    entries = {
        key: {
            "kernel": kernels[key],
            "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in contents.items()},
        }
        for key, contents in files.items()
    }
    manifest = {"kind": KIND, "schema": SCHEMA, "package_version": __version__, "entries": entries}
    try:
        digest = _write_tar(target, json.dumps(manifest, indent=1, sort_keys=True).encode(), files)
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
        What was imported.  Imported kernels are used even where another compiler is installed, or none.

    Raises:
        PackError: the pack is damaged, foreign or not to be trusted, or the cache cannot be written.
    """
    source = Path(path)
    cache = user_cache() if root is None else KernelCache(Path(root).absolute(), shared=True)
    with _opened(source) as (archive, manifest):
        for _ in _entries(source, archive, manifest):
            pass
    imported, present, size = [], [], 0
    with _opened(source) as (archive, again):
        if again != manifest:
            raise PackError(f"{source} changed while it was read")
        for key, files in _entries(source, archive, again):
            if cache.load(key) is not None:
                present.append(key)
            elif cache.publish(key, {**files, IMPORTED: f"{source.name}\n".encode()}):
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
    source = Path(path)
    with _opened(source) as (archive, manifest):
        keys = tuple(key for key, _ in _entries(source, archive, manifest))
    kernels = tuple(str(manifest["entries"][key].get("kernel", "")) for key in keys)
    version = str(manifest.get("package_version", ""))
    return PackInfo(source, keys, kernels, source.stat().st_size, _file_sha256(source), version)


def _without_origin(meta: dict[str, Any]) -> bytes:
    """Metadata for other machines: not when, where and how fast it was compiled."""
    kept = {name: value for name, value in meta.items() if name not in ("created_at", "host", "compile_ms")}
    if "nvrtc" in kept:
        kept["nvrtc"] = {name: value for name, value in kept["nvrtc"].items() if name != "path"}
    return json.dumps(kept, indent=1, sort_keys=True).encode()


def _caches(cache: KernelCache | None) -> tuple[KernelCache, ...]:
    return (user_cache(), *readonly_caches()) if cache is None else (cache,)


def _chosen(what: Iterable[str | KernelSpec] | None, cache: KernelCache | None) -> Iterator[tuple[str, Path, int]]:
    """Key, directory and forbidden permissions of what is to be exported, each once, by key."""
    caches = _caches(cache)
    found: dict[str, tuple[Path, int]] = {}
    if what is None:
        for each in reversed(caches):  # what several have comes from the first
            keys = each.keys()  # of those too whose metadata cannot be read
            found.update((key, (each.entry_path(key), each.forbidden)) for key in keys)
    given = [what] if not isinstance(what, Iterable) or isinstance(what, str | KernelSpec) else what
    for item in given if what is not None else ():
        if not isinstance(item, str | KernelSpec):
            raise ConfigError(f"what: {item!r:.80} given; allowed: keys and KernelSpecs")
        entry = _of_spec(item, caches) if isinstance(item, KernelSpec) else find_key(item, caches)
        found[entry.key] = entry.path, entry.cache.forbidden
    for key in sorted(found):
        yield (key, *found[key])


def _of_spec(spec: KernelSpec, caches: tuple[KernelCache, ...]) -> Found:
    from megamoe_jit._jit.runtime import warmup_command

    entries = entries_of(spec, caches)
    usable = [each for each in entries if each.fit > Fit.NAME]
    if not usable:
        what = "is in the cache only as compiled from another source" if entries else "is not in the cache"
        raise KernelMissingError(f"kernel {spec.entry} {what}; run: {warmup_command(spec)}")
    try:
        return first_whole(usable, with_source=True)
    except (OSError, Damaged) as problem:
        raise PackError(f"cannot export {usable[0].path}: {problem}") from None


def _write_tar(target: Path, manifest: bytes, files: dict[str, dict[str, bytes]]) -> str:
    """Write to a temporary file beside the target, then rename; the sha256 of the file."""
    import gzip

    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(handle, "wb") as raw:
            with contextlib.ExitStack() as stack:
                stream: Any = raw
                if target.suffix in (".gz", ".tgz"):
                    stream = stack.enter_context(gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0))
                archive = stack.enter_context(tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT))
                _add(archive, MANIFEST, manifest)
                for key in sorted(files):
                    for part in _FILES:
                        _add(archive, f"entries/{key}/{part}", files[key][part])
            raw.flush()
            os.fsync(raw.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return _file_sha256(target)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    archive.addfile(member, io.BytesIO(data))


class _PlainFile(tarfile.TarInfo):
    """The header of a member; any but that of a plain file is refused before tarfile follows it anywhere."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise tarfile.ReadError(f"{info.name!r} is not a plain file")
        return info


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[tarfile.TarFile, dict[str, Any]]]:
    """The archive, read as a stream behind its manifest."""
    try:
        with tarfile.open(path, mode="r|*", tarinfo=_PlainFile) as archive:
            yield archive, _manifest(path, archive)
    except FileNotFoundError:
        raise PackError(f"{path} does not exist") from None
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise PackError(f"cannot read {path}: {error}") from error


def _manifest(path: Path, archive: tarfile.TarFile) -> dict[str, Any]:
    first = archive.next()
    if first is None or first.name != MANIFEST:
        raise PackError(f"{path} is not a pack of megamoe-jit: it does not begin with {MANIFEST}")
    try:
        manifest = json.loads(_contents(path, archive, first, MANIFEST_LIMIT))
        kind, schema = manifest["kind"], manifest["schema"]
        if kind != KIND or schema != SCHEMA:
            raise PackError(
                f"{path} is {kind!r} of schema {schema!r}; this version reads {KIND!r} of schema {SCHEMA}: "
                "export it again with the version that imports it"
            )
        total = 0
        for key, entry in manifest["entries"].items():
            if not is_key(key) or set(entry["files"]) != set(_FILES):
                raise PackError(f"{path}: its manifest names {key!r} with {', '.join(entry['files'])}")
            total += sum(int(file["bytes"]) for file in entry["files"].values() if file["sha256"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise PackError(f"{path}: its manifest is damaged") from None
    if total > PACK_LIMIT:
        raise PackError(f"{path} holds {total} bytes; allowed: {PACK_LIMIT}")
    return dict(manifest)


def _entries(path: Path, archive: tarfile.TarFile, manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Every entry of the manifest, verified."""
    left = {key: dict(entry["files"]) for key, entry in manifest["entries"].items()}
    files: dict[str, bytes] = {}
    before = ""
    while (member := archive.next()) is not None:
        match = _MEMBER.fullmatch(member.name)
        expected = left.get(match[1], {}).pop(match[2], None) if match else None
        if match is None or expected is None:
            raise PackError(f"{path} holds {member.name!r}, which is not in its manifest")
        key, name = match.groups()
        data = _contents(path, archive, member, min(LIMIT, int(expected["bytes"])))
        if len(data) != expected["bytes"] or _sha256(data) != expected["sha256"]:
            raise PackError(f"{path} is damaged: {member.name} is not what its manifest says")
        if files and key != before:
            raise PackError(f"{path}: the files of {before} do not follow each other")
        before = key
        files[name] = data
        if left[key]:
            continue
        del left[key]
        try:
            schema = verify_files(key, files)["schema"]
        except Damaged as damage:
            raise PackError(f"{path}: the kernel {key} is damaged: {damage}") from None
        if schema != SCHEMA:
            raise PackError(f"{path}: the kernel {key} has schema {schema}, not {SCHEMA}")
        yield key, files
        files = {}
    if left:
        raise PackError(f"{path} is cut off: {len(left)} kernels of its manifest are missing")


def _contents(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    if not member.isreg():
        raise PackError(f"{path}: {member.name!r} is not a plain file")
    if member.size > limit:
        raise PackError(f"{path}: {member.name!r} has {member.size} bytes; allowed: {limit}")
    with archive.extractfile(member) or io.BytesIO() as file:
        return file.read()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
