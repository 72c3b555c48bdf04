"""Compiled kernels on disk: named by content, verified on load, published by one rename.

Layout::

    <root>/v1/<first two hex digits>/<key>/kernel.cubin
                                           meta.json
                                           kernel.cu
    <root>/v1/.tmp/                        entries being written
    <root>/v1/quarantine/                  entries that failed verification

An entry is complete or absent: it is written in a staging directory, synchronised, and renamed. Whoever
loses the race for a name drops its copy, since equal names mean equal inputs. The cache may fail in any
way without failing the caller: every problem is one warning, and the kernel that was just compiled is
used from memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe_jit._cubin import CubinError, cubin_arch
from megamoe_jit._locks import check_private, private_directory

if TYPE_CHECKING:
    from megamoe_jit._toolchain import Toolchain

__all__ = ["SCHEMA", "CacheEntry", "KernelCache", "cache_key"]

LOG = logging.getLogger("megamoe_jit")
SCHEMA = 1
CUBIN, META, SOURCE = "kernel.cubin", "meta.json", "kernel.cu"
STALE_STAGING_S = 3600.0
TOUCH_S = 3600.0  #: an entry's last use is noted at most this often


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A verified entry: the cubin's bytes and what `meta.json` says."""

    key: str
    cubin: bytes
    meta: dict[str, Any]
    path: Path


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
    digest = hashlib.sha256()

    def add(label: str, value: str) -> None:
        for part in (label.encode(), value.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)

    add("schema", str(SCHEMA))
    add("entry", entry)
    add("source", source_text)
    for option in options:
        add("option", option)
    add("arch", arch)
    add("compiler version", f"{toolchain.version[0]}.{toolchain.version[1]}")
    add("compiler build", toolchain.build)
    return digest.hexdigest()


class _Damaged(Exception):
    """An entry is there but must not be used."""


class KernelCache:
    """The entries under one root directory.

    Args:
        root: the directory; entries lie in a subdirectory named after the schema.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / f"v{SCHEMA}"  #: where this schema's entries lie
        self._warned: set[str] = set()

    def entry_path(self, key: str) -> Path:
        """Directory of an entry, whether it exists or not."""
        return self.path / key[:2] / key

    def load(self, key: str) -> CacheEntry | None:
        """Read and verify an entry.

        Args:
            key: from `cache_key`.

        Returns:
            The entry; None if there is none, or none to be trusted (a damaged one is moved to quarantine).
        """
        folder = self.entry_path(key)
        try:
            check_private(self.path)
            if not folder.is_dir():
                return None
            cubin, meta = self._verified(key, folder)
        except FileNotFoundError:
            return None
        except _Damaged as damage:
            LOG.warning("cached kernel %s is damaged (%s) and is compiled again", folder, damage)
            self._quarantine(key, folder)
            return None
        except OSError as error:
            self._warn("read", f"cannot read kernel cache {self.path}: {error}")
            return None
        if meta["schema"] != SCHEMA:
            return None
        self._touch(folder / META)
        return CacheEntry(key, cubin, meta, folder)

    def store(self, key: str, cubin: bytes, source: str, meta: Mapping[str, Any]) -> bool:
        """Publish an entry; never raises `OSError`.

        Args:
            key: from `cache_key`.
            cubin: the compiled kernel.
            source: the flattened source, kept beside it for reading.
            meta: plain data about it; identity, size, digest and date are added.

        Returns:
            Whether the entry is there now, written by this call or by someone else meanwhile.
        """
        staging: Path | None = None
        try:
            if not self.root.exists():
                private_directory(self.root)
            private_directory(self.path)
            private_directory(self.path / ".tmp")
            self._sweep()
            staging = self.path / ".tmp" / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(6)}"
            staging.mkdir(mode=0o700)
            document = {
                **meta,
                "schema": SCHEMA,
                "key": key,
                "arch": cubin_arch(cubin),
                "cubin_bytes": len(cubin),
                "cubin_sha256": hashlib.sha256(cubin).hexdigest(),
                "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "host": socket.gethostname(),
            }
            _write(staging / SOURCE, source.encode())
            _write(staging / CUBIN, cubin)
            _write(staging / META, json.dumps(document, indent=1, sort_keys=True).encode())
            _sync_directory(staging)
            target = self.entry_path(key)
            private_directory(target.parent)
            os.rename(staging, target)
            staging = None
            _sync_directory(target.parent)
        except OSError as error:
            if staging is not None and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return True
            self._warn("write", f"cannot write kernel cache {self.path}: {error}; kernels stay in memory")
            return False
        finally:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
        return True

    def entries(self) -> list[dict[str, Any]]:
        """The metadata of every readable entry, oldest first.

        Each has `path`, `used_at` and `disk_bytes` added.  Nothing is verified beyond
        the metadata being readable; `load` does that.
        """
        found = []
        for meta_path in self.path.glob(f"[0-9a-f][0-9a-f]/*/{META}"):
            with contextlib.suppress(OSError, ValueError):
                document = json.loads(meta_path.read_bytes())
                if isinstance(document, dict) and document.get("schema") == SCHEMA:
                    document["path"] = str(meta_path.parent)
                    document["used_at"] = meta_path.stat().st_mtime
                    document["disk_bytes"] = sum(p.stat().st_size for p in meta_path.parent.iterdir())
                    found.append(document)
        return sorted(found, key=lambda d: (str(d.get("created_at")), str(d.get("key"))))

    def remove(self, key: str) -> bool:
        """Delete an entry; whether there was one and it is gone now."""
        folder = self.entry_path(key)
        grave = self.path / ".tmp" / f"removed-{secrets.token_hex(6)}"
        try:
            private_directory(grave.parent)
            os.rename(folder, grave)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._warn("remove", f"cannot remove from kernel cache {self.path}: {error}")
            return False
        shutil.rmtree(grave, ignore_errors=True)
        return True

    def _verified(self, key: str, folder: Path) -> tuple[bytes, dict[str, Any]]:
        try:
            meta = json.loads((folder / META).read_bytes())
            cubin = (folder / CUBIN).read_bytes()
        except FileNotFoundError as error:
            if not folder.is_dir():  # removed meanwhile
                raise
            raise _Damaged(f"{os.path.basename(error.filename)} is missing") from None
        except ValueError:
            raise _Damaged(f"{META} is not JSON") from None
        if not isinstance(meta, dict) or not isinstance(meta.get("schema"), int):
            raise _Damaged(f"{META} has no schema")
        if meta["schema"] != SCHEMA:
            return cubin, meta
        if meta.get("key") != key:
            raise _Damaged(f"{META} is of another kernel")
        if len(cubin) != meta.get("cubin_bytes"):
            raise _Damaged(f"{CUBIN} has {len(cubin)} bytes instead of {meta.get('cubin_bytes')}")
        if hashlib.sha256(cubin).hexdigest() != meta.get("cubin_sha256"):
            raise _Damaged(f"the digest of {CUBIN} is wrong")
        try:
            arch = cubin_arch(cubin)
        except CubinError as error:
            raise _Damaged(f"{CUBIN}: {error}") from None
        if arch != meta.get("arch"):
            raise _Damaged(f"{CUBIN} is for {arch} instead of {meta.get('arch')}")
        return cubin, meta

    def _quarantine(self, key: str, folder: Path) -> None:
        with contextlib.suppress(OSError):
            place = private_directory(self.path / "quarantine")
            os.rename(folder, place / f"{key}-{secrets.token_hex(4)}")

    def _sweep(self) -> None:
        """Drop what killed writers left behind."""
        limit = time.time() - STALE_STAGING_S
        with contextlib.suppress(OSError):
            for path in (self.path / ".tmp").iterdir():
                if path.stat().st_mtime < limit:
                    shutil.rmtree(path, ignore_errors=True)

    def _touch(self, path: Path) -> None:
        """Note the use in the modification time: access times are off on many mounts."""
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - TOUCH_S:
                os.utime(path)

    def _warn(self, cause: str, message: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            LOG.warning("%s", message)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot synchronise a directory
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
