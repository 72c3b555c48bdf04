"""Reading files whose path a user may name: plain ones only, and no more of them than they can need.

A path in a setting or an argument may lead to a pipe that nobody writes to, to a device without an end, or to a file
of gigabytes. None of these may hang a command, or take its memory.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from megamoe_jit._text import human_bytes

__all__ = ["SMALL", "file_sha256", "read_plain", "read_text", "read_toml", "stays_inside"]

SMALL = 1 << 20  #: bytes; what people write is kilobytes
_TOML_BYTES = 1 << 18
_TOML_DOTS = 256  #: in one line: `tomllib` needs memory by the square of the names in a dotted key
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def stays_inside(name: str) -> bool:
    """Whether a name stays in the folder that it is relative to, and is written in the one way in which it can be."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and str(path) == name


def read_plain(path: str | os.PathLike[str], limit: int = SMALL) -> bytes:
    """The bytes of a regular file; of the null device, none.

    Args:
        path: of the file; links are followed.
        limit: the most bytes it may have.

    Raises:
        OSError: it cannot be read, is something else than a file, or is larger; `strerror` says which.
    """
    path = os.fspath(path)
    if "\0" in path:
        raise OSError(errno.EINVAL, "the path holds a NUL character", path)
    if _must_be_plain(os.stat(path), path):  # before it is opened: that alone may wind back a tape, or wait
        return b""
    handle = os.open(path, _FLAGS)
    try:
        if _must_be_plain(os.fstat(handle), path):
            return b""
        return _read(handle, path, limit)
    finally:
        os.close(handle)


def read_text(path: str | os.PathLike[str], limit: int = SMALL) -> str:
    """As `read_plain`, decoded, without the mark that some editors put in front; `UnicodeDecodeError` if not UTF-8."""
    return read_plain(path, limit).decode("utf-8-sig")


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a TOML file of settings or shapes says.

    Raises:
        OSError: as `read_plain`.
        ValueError: it is not UTF-8, not TOML, or more than any such file needs; says why.
    """
    text = read_text(path, _TOML_BYTES)
    for number, line in enumerate(text.splitlines(), start=1):
        if line.count(".") > _TOML_DOTS:
            raise ValueError(f"more than {_TOML_DOTS} dots in one line (at line {number})")
    if not text:  # of the null device, which says that there are none
        return {}
    import tomllib  # not where there is no file, which is most often

    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("values are nested too deep") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file of the package's own, in hexadecimal; `OSError` if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _must_be_plain(status: os.stat_result, path: str) -> bool:
    """Whether it is the null device; raises `OSError` if it is neither that nor a regular file."""
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if stat.S_ISREG(status.st_mode):
        return False
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == os.stat(os.devnull).st_rdev:
        return True
    raise OSError(errno.EINVAL, "it is no regular file", path)


def _read(handle: int, path: str, limit: int) -> bytes:
    parts, left = list[bytes](), limit + 1
    while left and (part := os.read(handle, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    if not left:
        raise OSError(errno.EFBIG, f"it has more than {human_bytes(limit)}", path)
    return b"".join(parts)
