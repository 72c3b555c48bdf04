"""Safetensors files that are written piece by piece, in any order: no more than a piece has to be in memory.

A file has its name when all of it is on disk; until then it is `NAME.partial`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._text import shown
from megamoe_jit.checkpoints.files import Entry

_BITS = {  # of every dtype that torch reads
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    "F4": 4,
}
_ALIGNED = 64  #: of the first byte behind the header, so that tensors mapped from the file may be used as they lie
PARTIAL = ".partial"


def nbytes(name: str, entry: Entry) -> int:
    """Bytes of a tensor; raises `ConfigError` where its dtype is one that torch does not read."""
    if entry.dtype not in _BITS:
        raise ConfigError(f"{shown(name, 200)} is {entry.dtype}, which cannot be copied; allowed: {', '.join(_BITS)}")
    return _BITS[entry.dtype] * math.prod(entry.shape) // 8


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, in the CPU's memory."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]


class Writer:
    """An open file; see `writing`."""

    def __init__(self, file: BinaryIO, start: int, begins: Mapping[str, int]) -> None:
        self._file, self._start, self._begins = file, start, begins

    def put(self, name: str, tensor: torch.Tensor, offset: int = 0) -> None:
        """Write a tensor, or the part of it that begins `offset` bytes behind its first."""
        self._file.seek(self._start + self._begins[name] + offset)
        self._file.write(bytes_of(tensor))


@contextlib.contextmanager
def writing(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> Iterator[Writer]:
    """A file with these tensors, whose bytes are written inside; it gets its name at the end, or is not there."""
    begins, at = {}, 0
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    # larger elements first: then each tensor begins at a multiple of its elements' size
    sizes = {name: nbytes(name, entry) for name, entry in entries.items()}
    for name, entry in sorted(entries.items(), key=lambda item: -_BITS[item[1].dtype]):
        begins[name] = at
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, at + sizes[name]]}
        at += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
            yield Writer(file, 8 + len(text), begins)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        name_in(error, path)
        raise


def name_in(error: BaseException, path: Path) -> None:
    """Enter the file into an error of the operating system that names none, as one of a full disk."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = os.fspath(path)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else is in here with this folder: two conversions would write the same unfinished files.

    Raises:
        ConfigError: another one writes into it.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another conversion writes into {folder}; allowed: wait until it has ended, or another folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
