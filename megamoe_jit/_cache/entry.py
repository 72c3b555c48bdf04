"""One compiled kernel as three files: how it is named, read and verified.

``kernel.cubin`` is what the driver gets, ``meta.json`` says what it is and carries the digests, ``kernel.cu`` is the
source it was compiled from. Reading goes through a handle of the directory, so that an entry which is removed or
replaced meanwhile is either whole or a miss, never half of two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe_jit._cache.locks import owner_problem
from megamoe_jit._compile.cubin import CubinError, cubin_arch

if TYPE_CHECKING:
    from megamoe_jit._compile.toolchain import Toolchain

__all__ = [
    "CUBIN",
    "IMPORTED",
    "META",
    "SCHEMA",
    "SOURCE",
    "CacheEntry",
    "Damaged",
    "EntryInfo",
    "by_compiler",
    "cache_key",
    "is_key",
    "read_entry",
    "read_info",
    "same_place",
    "source_id",
    "verify_files",
]

SCHEMA = 1
CUBIN, META, SOURCE = "kernel.cubin", "meta.json", "kernel.cu"
IMPORTED = "imported"  #: marks an entry that came from a pack, whoever compiled it
LIMIT = 64 << 20  #: no file of an entry is larger

#: how files are opened: a named pipe in the place of one must not hold up who does
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

#: reading a file of an entry fails in these ways when it will fail the next time too
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.ENXIO)

#: what the metadata holds, where it holds it
_TYPES = {"spec": dict, "nvrtc": dict, "compile_ms": dict, "options": list, "advisories": list}

#: options that only some compilers know and that do not shape the code
_NEUTRAL_OPTIONS = ("--no-cache",)


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A verified entry: the cubin's bytes and what `meta.json` says."""

    key: str
    cubin: bytes
    meta: dict[str, Any]
    path: Path


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """What a listing shows of an entry; nothing is verified beyond the metadata being readable.

    Attributes:
        key: its name.
        path: its directory.
        meta: what `meta.json` says.
        used_at: when it was last used, in seconds since 1970, to the hour.
        disk_bytes: size of its files.
    """

    key: str
    path: Path
    meta: dict[str, Any] = dataclasses.field(compare=False, repr=False)
    used_at: float
    disk_bytes: int

    @property
    def entry(self) -> str:
        """Symbol of the kernel."""
        return str(self.meta.get("entry", ""))

    @property
    def created_at(self) -> str:
        """When it was compiled, ISO 8601 in UTC."""
        return str(self.meta.get("created_at", ""))

    @property
    def compiler(self) -> str:
        """Version of the NVRTC that made it."""
        nvrtc = self.meta.get("nvrtc")
        return str(nvrtc.get("version", "")) if isinstance(nvrtc, dict) else ""

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data: the metadata and what the file system adds."""
        return {
            **self.meta,
            "key": self.key,
            "path": str(self.path),
            "used_at": self.used_at,
            "disk_bytes": self.disk_bytes,
        }


class Damaged(Exception):
    """An entry is there but must not be used."""


def _digest(fields: Iterable[tuple[str, str]]) -> str:
    """Sha256 over labelled fields with their lengths, so that no two lists of fields look alike."""
    digest = hashlib.sha256()
    for field in fields:
        for part in field:
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()


def cache_key(source_text: str, options: Iterable[str], entry: str, arch: str, toolchain: Toolchain) -> str:
    """The name of a compiled kernel: sha256 over everything that decides its bytes, and over nothing else.

    Paths, user, host, working directory, Python, torch and driver are not in it: a cache can be shared and
    moved.

    Args:
        source_text: the flattened source.
        options: compiler options, in order.
        entry: symbol of the kernel.
        arch: target architecture.
        toolchain: the compiler; its path does not count.

    Returns:
        64 hexadecimal digits.
    """
    version = f"{toolchain.version[0]}.{toolchain.version[1]}"
    compiler = [("compiler version", version), ("compiler build", toolchain.build)]
    return _digest([*_identity(source_text, options, entry, arch), *compiler])


def source_id(source_text: str, options: Iterable[str], entry: str, arch: str) -> str:
    """What a kernel is whoever compiled it: `cache_key` without the compiler.

    Finds kernels that were built elsewhere, on purpose, by another compiler than the one installed here.
    """
    shaping = [option for option in options if option not in _NEUTRAL_OPTIONS]
    return _digest(_identity(source_text, shaping, entry, arch))


def _identity(source_text: str, options: Iterable[str], entry: str, arch: str) -> list[tuple[str, str]]:
    return [
        ("schema", str(SCHEMA)),
        ("entry", entry),
        ("source", source_text),
        *(("option", option) for option in options),
        ("arch", arch),
    ]


def is_key(text: str) -> bool:
    """Whether `text` is spelled like a key."""
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def read_entry(
    key: str, folder: Path, forbidden: int = 0o022, *, with_source: bool = False
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files and metadata of an entry, verified.

    Args:
        key: what the entry must be.
        folder: its directory.
        forbidden: permission bits that none of its files may have.
        with_source: read and verify the source too.

    Raises:
        FileNotFoundError: there is none, or it was removed meanwhile.
        Damaged: it is there but must not be used.
        OSError: it cannot be read.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise Damaged("it is not a directory") from None
        raise
    try:
        _check_owner("its directory", os.fstat(handle), forbidden)
        try:
            names = (META, CUBIN, SOURCE) if with_source else (META, CUBIN)
            files = {name: _read(handle, name, forbidden) for name in names}
        except FileNotFoundError as error:
            if not same_place(handle, folder):
                raise
            raise Damaged(f"{os.path.basename(error.filename)} is missing") from None
        return files, verify_files(key, files)
    finally:
        os.close(handle)


def same_place(handle: int, folder: Path) -> bool:
    """Whether the path still leads to the directory that `handle` holds."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(handle), os.lstat(folder))
    return False


def verify_files(key: str, files: dict[str, bytes]) -> dict[str, Any]:
    """Check metadata against key and files, the source too where it is given.

    Returns:
        The metadata, with a `schema` that may be another than ours; nothing else is checked then.

    Raises:
        Damaged: something does not agree.
    """
    cubin = files[CUBIN]
    try:
        meta = json.loads(files[META])
    except (ValueError, RecursionError):
        raise Damaged(f"{META} is not JSON") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("schema"), int):
        raise Damaged(f"{META} has no schema")
    if meta["schema"] != SCHEMA:
        return meta
    if meta.get("key") != key:
        raise Damaged(f"{META} is of another kernel")
    for name, kind in _TYPES.items():
        if not isinstance(meta.get(name, kind()), kind):
            raise Damaged(f"{name} in {META} is not what it should be")
    if len(cubin) != meta.get("cubin_bytes"):
        raise Damaged(f"{CUBIN} has {len(cubin)} bytes instead of {meta.get('cubin_bytes')}")
    if hashlib.sha256(cubin).hexdigest() != meta.get("cubin_sha256"):
        raise Damaged(f"the digest of {CUBIN} is wrong")
    try:
        arch = cubin_arch(cubin)
    except CubinError as error:
        raise Damaged(f"{CUBIN}: {error}") from None
    if arch != meta.get("arch"):
        raise Damaged(f"{CUBIN} is for {arch} instead of {meta.get('arch')}")
    if SOURCE in files and hashlib.sha256(files[SOURCE]).hexdigest() != meta.get("source_sha256"):
        raise Damaged(f"the digest of {SOURCE} is wrong")
    if SOURCE in files and len(files[SOURCE]) != meta.get("source_bytes"):
        raise Damaged(f"{SOURCE} has {len(files[SOURCE])} bytes instead of {meta.get('source_bytes')}")
    return meta


def read_info(key: str, folder: str) -> EntryInfo | None:
    """What a listing shows of the entry in `folder`; None if it has no metadata of this schema."""
    try:
        handle = os.open(f"{folder}/{META}", _READ)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_size > LIMIT:
                return None
            meta = json.loads(os.read(handle, status.st_size))
        finally:
            os.close(handle)
        if meta["schema"] != SCHEMA or meta["key"] != key:
            return None
        size = int(meta["cubin_bytes"]) + int(meta["source_bytes"]) + status.st_size
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return EntryInfo(key, Path(folder), meta, status.st_mtime, size)


def _read(handle: int, name: str, forbidden: int) -> bytes:
    try:
        file = os.open(name, _READ, dir_fd=handle)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise Damaged(f"{name} is not a plain file")
            _check_owner(name, status, forbidden)
            if status.st_size > LIMIT:
                raise Damaged(f"{name} has {status.st_size} bytes, more than any kernel")
            with open(file, "rb", buffering=0, closefd=False) as stream:
                return stream.readall()
        finally:
            os.close(file)
    except OSError as error:
        if error.errno in _UNREADABLE:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from None
        raise


def _check_owner(what: str, status: os.stat_result, forbidden: int) -> None:
    problem = owner_problem(status, forbidden)
    if problem:
        raise Damaged(f"{what} {problem}")


def by_compiler(found: Iterable[EntryInfo], major: int | None) -> list[EntryInfo]:
    """In the order in which a call tries them: the newest compiler first, but those newer than `major` last."""

    def rank(info: EntryInfo) -> tuple[bool, tuple[int, ...]]:
        version = tuple(int(part) for part in info.compiler.split(".") if part.isdigit())
        return major is None or version[:1] <= (major,), version

    return sorted(found, key=rank, reverse=True)
