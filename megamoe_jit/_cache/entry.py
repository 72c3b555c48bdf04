"""One compiled kernel as three files: how it is named, read and verified.

``kernel.cubin`` is what the driver gets, ``meta.json`` says what it is and carries the digests, ``kernel.cu`` is the
source it was compiled from. Reading goes through a handle of the directory, so that an entry which is removed or
replaced meanwhile is either whole or a miss, never half of two.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from megamoe_jit._cache.identity import identity_problem, kernel_problem
from megamoe_jit._cache.metadata import SCHEMA, Metadata, MetaError, read_metadata
from megamoe_jit._cache.trees import READ, is_closed
from megamoe_jit._compile.cubin import CubinError, cubin_arch
from megamoe_jit._trust import owner_problem

CUBIN, META, SOURCE = "kernel.cubin", "meta.json", "kernel.cu"
IMPORTED = "imported"  #: marks an entry that came from a pack, whoever compiled it
LIMIT = 64 << 20  #: no file of an entry is larger
CLOCKS_S = 600.0  #: clocks of machines that share a cache differ by less

#: reading a file of an entry fails in these ways when it will fail the next time too
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.ENXIO)


class CacheEntry(NamedTuple):
    """A verified entry: the cubin's bytes and what `meta.json` says."""

    key: str
    cubin: bytes
    meta: Metadata
    path: Path


class EntryInfo(NamedTuple):
    """What a listing shows of an entry; nothing is verified beyond the metadata.

    Attributes:
        key: its name.
        folder: its directory.
        meta: what `meta.json` says.
        used_at: when it was last used, in seconds since 1970, to the hour.
        disk_bytes: size of its files.
    """

    key: str
    folder: str
    meta: Metadata
    used_at: float
    disk_bytes: int

    @property
    def path(self) -> Path:
        """Its directory."""
        return Path(self.folder)

    @property
    def entry(self) -> str:
        """Symbol of the kernel."""
        return self.meta.get("entry", "")

    @property
    def created_at(self) -> str:
        """When it was compiled, ISO 8601 in UTC."""
        return self.meta.get("created_at", "")

    @property
    def compiler(self) -> str:
        """Version of the NVRTC that made it."""
        return self.meta.get("nvrtc", {}).get("version", "")


class Damaged(Exception):
    """An entry is there but must not be used."""


class OtherSchema(FileNotFoundError):
    """An entry is another version's: for this one it is not there."""


def read_entry(
    key: str, folder: Path, forbidden: int = 0o022, *, with_source: bool = False
) -> tuple[dict[str, bytes], Metadata]:
    """Files and metadata of an entry, verified.

    Args:
        key: what the entry must be.
        folder: its directory.
        forbidden: permission bits that none of its files may have.
        with_source: read and verify the source too, and that all is what the key names.

    Raises:
        FileNotFoundError: there is none, or it was removed meanwhile, or is another version's (`OtherSchema`).
        Damaged: it is there but must not be used.
        OSError: it cannot be read.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if isinstance(error, PermissionError) and is_closed(folder):  # so it would fail for ever
            raise Damaged("its directory is closed to its owner") from None
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        if not os.path.lexists(folder):  # what lies above it is none either
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder)) from None
        raise Damaged("it is not a directory") from None
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


def verify_files(key: str, files: dict[str, bytes]) -> Metadata:
    """Check metadata against key and files; where the source is given, also that all is what the key names.

    Raises:
        Damaged: something does not agree.
        OtherSchema: the metadata are of another schema; nothing else is checked then.
    """
    cubin = files[CUBIN]
    try:
        meta = read_metadata(files[META])
    except MetaError as error:
        raise Damaged(f"{META} {error}") from None
    if meta["schema"] != SCHEMA:
        raise OtherSchema(errno.ENOENT, f"it has schema {meta['schema']}, not {SCHEMA}", key)
    if meta["key"] != key:
        raise Damaged(f"{META} is of another kernel")
    if len(cubin) != meta["cubin_bytes"]:
        raise Damaged(f"{CUBIN} has {len(cubin)} bytes instead of {meta['cubin_bytes']}")
    _check_digest(CUBIN, cubin, meta["cubin_sha256"])
    try:
        arch = cubin_arch(cubin)
    except CubinError as error:
        raise Damaged(f"{CUBIN}: {error}") from None
    if arch != meta["arch"]:
        raise Damaged(f"{CUBIN} is for {arch} instead of {meta['arch']}")
    if SOURCE in files:
        _check_source(key, meta, files[SOURCE])
        check_kernel(cubin, meta, meta["entry"])
    return meta


def check_kernel(cubin: bytes, meta: Metadata, symbol: str) -> None:
    """Raise `Damaged` unless the binary defines this kernel alone, with the parameters that the metadata say."""
    if problem := kernel_problem(cubin, meta, symbol):
        raise Damaged(problem)


def _check_source(key: str, meta: Metadata, source: bytes) -> None:
    _check_digest(SOURCE, source, meta["source_sha256"])
    if len(source) != meta["source_bytes"]:
        raise Damaged(f"{SOURCE} has {len(source)} bytes instead of {meta['source_bytes']}")
    if problem := identity_problem(key, meta, source):
        raise Damaged(problem)


def _check_digest(name: str, data: bytes, digest: str) -> None:
    if hashlib.sha256(data).hexdigest() != digest:
        raise Damaged(f"the digest of {name} is wrong")


def read_info(key: str, folder: str, now: float | None = None) -> EntryInfo | None:
    """What a listing shows of the entry in `folder` at a time; None if it has no metadata of this schema and key."""
    try:
        handle = os.open(f"{folder}/{META}", READ)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_size > LIMIT:
                return None
            meta = read_metadata(os.read(handle, status.st_size))
        finally:
            os.close(handle)
    except (OSError, MetaError):
        return None
    if meta["schema"] != SCHEMA or meta["key"] != key:
        return None
    size = meta["cubin_bytes"] + meta["source_bytes"] + status.st_size
    return EntryInfo(key, folder, meta, last_use(status, time.time() if now is None else now), size)


def last_use(status: os.stat_result, now: float) -> float:
    """When something was last used or written, in seconds since 1970.

    A time in the future says nothing, and would keep what it is of for ever: then the time counts at which it was set,
    or none at all.
    """
    latest = now + CLOCKS_S
    used = status.st_mtime if status.st_mtime <= latest else status.st_ctime
    return max(0.0, used) if used <= latest else 0.0


def _read(handle: int, name: str, forbidden: int) -> bytes:
    try:
        file = os.open(name, READ, dir_fd=handle)
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
    if problem := owner_problem(status, forbidden):
        raise Damaged(f"{what} {problem}")


def by_compiler(found: Iterable[EntryInfo], major: int | None) -> list[EntryInfo]:
    """In the order in which a call tries them: the newest compiler first, but those newer than `major` last."""

    def rank(info: EntryInfo) -> tuple[bool, tuple[int, ...]]:
        version = tuple(int(part) for part in info.compiler.split(".") if part.isdigit())
        return major is None or version[:1] <= (major,), version

    return sorted(found, key=rank, reverse=True)
