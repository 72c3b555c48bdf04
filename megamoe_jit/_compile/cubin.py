"""What a cubin says about itself, read from the ELF alone: no driver, no CUDA tool, a fraction of a
millisecond.

Used to refuse a file that is not the kernel it should be, to check the parameter block of the host
against the one the kernel was compiled with, and to show registers and memory in listings. Understands
both layouts in use: the CUDA 12 one (ABI version 7) and the CUDA 13 one (ABI version 8), which moved the
architecture inside the ELF flags and tells `sm_90a` from `sm_90` only in the options it notes.
"""

from __future__ import annotations

import contextlib
import functools
import re
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_MACHINE_CUDA = 190
_ABI_13 = 8
_SHT_SYMTAB = 2
_RESERVED_SHARED = 1024  #: bytes the system keeps in every block, counted in the kernel's own section
_STO_ENTRY = 0x10  #: bit of a symbol's `st_other` that marks a kernel

# attribute numbers of .nv.info sections
_MAX_THREADS = 0x05
_FRAME_SIZE = 0x11
_PARAMETER = 0x17
_REGISTERS = 0x2F
_PARAMETER_V2 = 0x45

#: what reading at a position taken from a damaged file may raise
_UNREADABLE = (struct.error, IndexError, ValueError, OverflowError)


class CubinError(ValueError):
    """The bytes are not a cubin this reader understands."""


class KernelInfo(NamedTuple):
    """One kernel of a cubin.

    Attributes:
        name: its symbol.
        registers: registers per thread at launch.
        stack_bytes: frame of the entry function, per thread.
        static_shared_bytes: shared memory known at compile time, without what the system keeps.
        param_bytes: size of the parameters, from the first byte of the first to the last byte of the last.
        max_threads: threads of a block the kernel was compiled for, zero if it does not say.
    """

    name: str
    registers: int
    stack_bytes: int
    static_shared_bytes: int
    param_bytes: int
    max_threads: int


class CubinInfo(NamedTuple):
    """A cubin: its architecture, such as `sm_90a`, and its kernels by name."""

    arch: str
    entries: tuple[KernelInfo, ...]


class _Section(NamedTuple):
    name: str
    kind: int
    offset: int
    size: int
    link: int


@functools.lru_cache(maxsize=4)  # what is verified is loaded next
def cubin_arch(data: bytes) -> str:
    """The architecture a cubin is for, from the ELF header.

    Raises:
        CubinError: `data` is not a CUDA ELF.
    """
    if len(data) < 64 or data[:6] != b"\x7fELF\x02\x01":
        raise CubinError("not a 64-bit little-endian ELF file")
    (machine,) = struct.unpack_from("<H", data, 18)
    if machine != _MACHINE_CUDA:
        raise CubinError(f"ELF machine {machine} is not CUDA")
    (flags,) = struct.unpack_from("<I", data, 48)
    if data[8] >= _ABI_13:
        arch = f"sm_{(flags >> 8) & 0xFF}"
        return _noted_arch(data, arch) or arch
    return f"sm_{flags & 0xFF}{'a' if flags & 0x800 else ''}"


@functools.lru_cache(maxsize=4)
def read_cubin(data: bytes) -> CubinInfo:
    """Read architecture and kernels.

    Args:
        data: the whole file.

    Returns:
        What the file says; kernels in the order of their names.

    Raises:
        CubinError: `data` is not a whole cubin.
    """
    arch = cubin_arch(data)
    try:
        return CubinInfo(arch, tuple(_kernels(data)))
    except CubinError:
        raise
    except _UNREADABLE as error:
        raise CubinError(f"damaged cubin: {error}") from None


def _noted_arch(data: bytes, arch: str) -> str | None:
    """The `-arch` among the options that the assembler left in a note, if it agrees with the ELF flags."""
    with contextlib.suppress(*_UNREADABLE):
        for section in sections_of(data):
            if section.name == ".note.nv.tkinfo":
                note = data[section.offset : section.offset + section.size]
                found = re.search(rb"-arch[ =](sm_\d+[a-z]?)\b", note)
                if found and found[1].decode().rstrip("af") == arch:
                    return found[1].decode()
    return None


def _kernels(data: bytes) -> Iterator[KernelInfo]:
    sections = sections_of(data)
    by_name = {section.name: section for section in sections}
    symbols = _symbols(data, sections)
    reserved = _RESERVED_SHARED if ".nv.shared.reserved.0" in by_name else 0
    registers: dict[int, int] = {}
    frames: dict[int, int] = {}
    for attribute, value in _attributes(data, by_name.get(".nv.info")):
        if attribute in (_REGISTERS, _FRAME_SIZE) and len(value) >= 8:
            symbol, number = struct.unpack_from("<II", value)
            (registers if attribute == _REGISTERS else frames)[symbol] = number
    for name, symbol in sorted(symbols.items()):
        own = _attributes(data, by_name.get(f".nv.info.{name}"))
        shared = by_name.get(f".nv.shared.{name}")
        threads = next((value for attribute, value in own if attribute == _MAX_THREADS), b"")
        yield KernelInfo(
            name=name,
            registers=registers.get(symbol, 0),
            stack_bytes=frames.get(symbol, 0),
            static_shared_bytes=max(0, shared.size - reserved) if shared else 0,
            param_bytes=_param_bytes(own),
            max_threads=_product(threads),
        )


def _param_bytes(attributes: list[tuple[int, bytes]]) -> int:
    """From the parameters: the block itself may begin with padding that aligns the first one."""
    begins, ends = [], []
    for attribute, value in attributes:
        if attribute not in (_PARAMETER, _PARAMETER_V2):
            continue
        offset, size = struct.unpack_from("<HI", value, 6)
        begins.append(offset)
        ends.append(offset + (size >> 18 if attribute == _PARAMETER else size & 0xFFFF))
    return max(ends) - min(begins) if ends else 0


def _product(dimensions: bytes) -> int:
    if len(dimensions) < 12:
        return 0
    x, y, z = struct.unpack_from("<III", dimensions)
    return int(x * y * z)


@functools.lru_cache(maxsize=1)
def sections_of(data: bytes) -> tuple[_Section, ...]:
    """The sections of an ELF file; raises as reading a damaged one does."""
    programs, table = struct.unpack_from("<QQ", data, 32)
    program_size, program_count, size, count, names_index = struct.unpack_from("<HHHHH", data, 54)
    if max(programs + program_size * program_count, table + size * count) > len(data):
        raise CubinError("the file is cut off")
    raw = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    if not raw:
        raise CubinError("no sections")
    names = raw[names_index][4]
    found = []
    for name, kind, _, _, offset, length, link, *_ in raw:
        if kind != 8 and offset + length > len(data):  # 8: NOBITS, occupies no bytes of the file
            raise CubinError("a section lies outside the file")
        begin = names + name
        text = data[begin : data.index(b"\0", begin)].decode()
        found.append(tuple.__new__(_Section, (text, kind, offset, length, link)))  # of many, few are asked for
    return tuple(found)


def _symbols(data: bytes, sections: Sequence[_Section]) -> dict[str, int]:
    """Kernels by name, with their index in the symbol table."""
    found: dict[str, int] = {}
    for section in sections:
        if section.kind != _SHT_SYMTAB:
            continue
        strings = sections[section.link].offset
        for index in range(section.size // 24):
            name, _, other = struct.unpack_from("<IBB", data, section.offset + index * 24)
            if other & _STO_ENTRY:
                found[_text(data, strings + name)] = index
    return found


def _attributes(data: bytes, section: _Section | None) -> list[tuple[int, bytes]]:
    """Records of an `.nv.info` section: format byte, attribute byte, two bytes of value or of length."""
    found = list[tuple[int, bytes]]()
    if section is None:
        return found
    position, end = section.offset, section.offset + section.size
    while position + 4 <= end:
        form, attribute, short = struct.unpack_from("<BBH", data, position)
        position += 4
        if form == 4:
            found.append((attribute, data[position : position + short]))
            position += short
        else:
            found.append((attribute, short.to_bytes(2, "little")))
    return found


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()
