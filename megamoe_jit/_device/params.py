"""The kernel's one argument as a ctypes structure, made from what the compiler says of it (`_abi`).

The loader also compares its size with the parameter table inside the compiled kernel.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_uint32, c_uint64
from typing import Any

from megamoe_jit._spec.abi import PARAMS, PARAMS_ALIGN

__all__ = ["Params", "TensorMap", "aligned_params"]


class TensorMap(ctypes.Structure):
    """An opaque CUtensorMap, 128 bytes."""

    _fields_ = [("opaque", c_uint64 * 16)]


_KINDS: dict[str, Any] = {"u32": c_uint32, "u64": c_uint64, "float": c_float, "TensorMap": TensorMap}


class Params(ctypes.Structure):
    """`megamoe::Params`.  Pointers are plain integers; offsets are bytes in the symmetric buffer."""

    _fields_ = [(name, _KINDS[kind] * count if count > 1 else _KINDS[kind]) for name, kind, count, _ in PARAMS]


def aligned_params() -> Params:
    """A zeroed `Params` at an address that is a multiple of 64, as its tensor maps need."""
    memory = (ctypes.c_char * (ctypes.sizeof(Params) + PARAMS_ALIGN))()
    offset = -ctypes.addressof(memory) % PARAMS_ALIGN
    return Params.from_buffer(memory, offset)
