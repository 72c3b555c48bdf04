"""The one argument of each kind of kernel as a ctypes structure, made from what the compiler says of it (`_abi`).

The loader also compares its size with the parameter table inside the compiled kernel.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from ctypes import c_float, c_uint32, c_uint64
from typing import Any, TypeVar

from megamoe_jit._spec.abi import NODES_PARAMS, PARAMS, PARAMS_ALIGN, STAGE_PARAMS


class TensorMap(ctypes.Structure):
    """An opaque CUtensorMap, 128 bytes."""

    _fields_ = [("opaque", c_uint64 * 16)]


_T = TypeVar("_T", bound=ctypes.Structure)
_KINDS: dict[str, Any] = {"u32": c_uint32, "u64": c_uint64, "float": c_float, "TensorMap": TensorMap}
_PACKED = {"u32": "I", "u64": "Q", "float": "f"}  #: as the module `struct` names them


def _fields(members: Iterable[tuple[str, str, int, int]]) -> list[tuple[str, Any]]:
    return [(name, _KINDS[kind] * count if count > 1 else _KINDS[kind]) for name, kind, count, _ in members]


class Params(ctypes.Structure):
    """`megamoe::Params`.  Pointers are plain integers; offsets are bytes in the symmetric buffer."""

    _fields_ = _fields(PARAMS)


class StageParams(ctypes.Structure):
    """`megamoe::StageParams`, of kernels that stage.  Pointers are plain integers."""

    _fields_ = _fields(STAGE_PARAMS)


class NodesParams(ctypes.Structure):
    """`megamoe::NodesParams`, of passes over rows between nodes.  Pointers are plain integers."""

    _fields_ = _fields(NODES_PARAMS)


def side_by_side(*names: str) -> tuple[struct.Struct, int]:
    """What packs these fields of `Params` at once, and where: a call has no time to set them one by one.

    Raises:
        ValueError: they do not follow each other in this order, without room between.
    """
    fields = [getattr(Params, name) for name in names]
    packer = struct.Struct("<" + "".join(_PACKED[kind] for name, kind, _, _ in PARAMS if name in names))
    ends = [field.offset + field.size for field in fields]
    if [field.offset for field in fields[1:]] != ends[:-1] or packer.size != ends[-1] - fields[0].offset:
        raise ValueError(f"{', '.join(names)} are not side by side in Params")
    return packer, fields[0].offset


def aligned(kind: type[_T]) -> _T:
    """Zeroed parameters of a kind, at an address that is a multiple of 64, as tensor maps need."""
    memory = (ctypes.c_char * (ctypes.sizeof(kind) + PARAMS_ALIGN))()
    return kind.from_buffer(memory, -ctypes.addressof(memory) % PARAMS_ALIGN)
