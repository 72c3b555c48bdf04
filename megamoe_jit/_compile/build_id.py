"""What tells one build of a shared library from another: its build id, read from the file alone."""

from __future__ import annotations

import hashlib
import mmap
import struct
from pathlib import Path


def build_id(path: Path) -> str:
    """The GNU build id of an ELF file; the sha256 of its bytes if it carries none.

    Raises:
        OSError, ValueError: it cannot be read, or is cut short.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            note = _build_id_note(data)
        except (struct.error, OverflowError):
            raise ValueError(f"it is cut short, at {len(data)} bytes, or damaged") from None
        if note:
            return note.hex()
        digest = hashlib.sha256()
        for start in range(0, len(data), 1 << 20):
            digest.update(data[start : start + (1 << 20)])
        return "sha256:" + digest.hexdigest()


def _build_id_note(data: mmap.mmap | bytes) -> bytes | None:
    """Walk the PT_NOTE segments of a 64-bit little-endian ELF."""
    if bytes(data[:6]) != b"\x7fELF\x02\x01":
        return None
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    for index in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", data, table + index * size)
        if kind != 4:
            continue
        end = offset + length
        while offset + 12 <= end:
            name_size, body_size, note = struct.unpack_from("<III", data, offset)
            name = offset + 12
            body = name + (name_size + 3) // 4 * 4
            if note == 3 and bytes(data[name : name + name_size]) == b"GNU\0":
                return bytes(data[body : body + body_size])
            offset = body + (body_size + 3) // 4 * 4
    return None
