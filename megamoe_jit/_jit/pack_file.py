"""The file of a pack: a tar archive that begins with a manifest of what follows; written whole, read with mistrust."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

from megamoe_jit._cache.entry import CUBIN, LIMIT, META, SOURCE, Damaged, OtherSchema, verify_files
from megamoe_jit._cache.identity import is_key
from megamoe_jit._cache.metadata import SCHEMA
from megamoe_jit._errors import PackError
from megamoe_jit._files import file_sha256
from megamoe_jit._text import first_line, shown

KIND = "megamoe-jit-pack"
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 32 << 20
PACK_LIMIT = 4 << 30  #: bytes of all files of a pack together
FILES = (CUBIN, META, SOURCE)
_MEMBER = re.compile(r"entries/([0-9a-f]{64})/(" + "|".join(map(re.escape, FILES)) + ")")


def write_tar(target: Path, manifest: bytes, files: dict[str, dict[str, bytes]]) -> str:
    """Write to a temporary file beside the target, then rename; the sha256 of the file."""
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
                    for part in FILES:
                        _add(archive, f"entries/{key}/{part}", files[key][part])
            raw.flush()
            os.fsync(raw.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return file_sha256(target)


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
def opened(path: Path) -> Iterator[tuple[tarfile.TarFile, dict[str, Any]]]:
    """The archive, read as a stream behind its manifest."""
    begun = False
    try:
        with _plain(path) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_PlainFile) as archive:
            begun = True
            yield archive, _manifest(path, archive)
    except FileNotFoundError:
        raise PackError(f"{path} does not exist") from None
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if not begun and isinstance(error, tarfile.TarError):
            raise PackError(f"{path} is not a pack of megamoe-jit: {error}") from error
        reason = getattr(error, "strerror", None) or first_line(error, 300)
        raise PackError(f"cannot read {shown(str(path), 300)}: {reason}") from error


def _plain(path: Path) -> BufferedReader:
    """The file, opened; one that is no regular file is refused, and a pipe does not hold up who does."""
    _must_be_plain(path, os.stat(path))  # also what may not be opened, as a directory of mode 0
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _must_be_plain(path, os.fstat(handle))
    except PackError:
        os.close(handle)
        raise
    return open(handle, "rb")


def _must_be_plain(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise PackError(f"{path} is not a plain file")


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
            if not is_key(key) or set(entry["files"]) != set(FILES):
                raise PackError(f"{path}: its manifest names {key!r} with {', '.join(entry['files'])}")
            total += _size(entry)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise PackError(f"{path}: its manifest is damaged") from None
    if total > PACK_LIMIT:
        raise PackError(f"{path} holds {total} bytes; allowed: {PACK_LIMIT}")
    return dict(manifest)


def entries_in(
    path: Path, archive: tarfile.TarFile, manifest: dict[str, Any]
) -> Iterator[tuple[str, dict[str, bytes]]]:
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
        data = _contents(path, archive, member, expected["bytes"])
        if len(data) != expected["bytes"] or sha256(data) != expected["sha256"]:
            raise PackError(f"{path} is damaged: {member.name} is not what its manifest says")
        if files and key != before:
            raise PackError(f"{path}: the files of {before} do not follow each other")
        before = key
        files[name] = data
        if left[key]:
            continue
        del left[key]
        try:
            meta = verify_files(key, files)
        except Damaged as damage:
            raise PackError(f"{path}: the kernel {key} is damaged: {damage}") from None
        except OtherSchema as other:
            raise PackError(f"{path}: the kernel {key} cannot be read: {other.strerror}") from None
        if meta["entry"] != manifest["entries"][key]["kernel"]:
            raise PackError(f"{path}: the kernel {key} is {meta['entry']}, which is not what the manifest says")
        yield key, files
        files = {}
    if left:
        raise PackError(f"{path} is cut off: {len(left)} kernels of its manifest are missing")


def _contents(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    if not 0 <= member.size <= limit:
        raise PackError(f"{path}: {member.name!r} has {member.size} bytes; allowed: {limit}")
    with archive.extractfile(member) or io.BytesIO() as file:
        return file.read()


def _size(entry: dict[str, Any]) -> int:
    """Bytes of an entry, by the manifest; raises `ValueError` if that says no size, digest or name of a kernel."""
    for file in entry["files"].values():
        if type(file["bytes"]) is not int or not 0 <= file["bytes"] <= LIMIT or not is_key(file["sha256"]):
            raise ValueError
    if not entry["kernel"].isprintable():
        raise ValueError
    return sum(file["bytes"] for file in entry["files"].values())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
