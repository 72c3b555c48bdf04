"""TMA descriptors, encoded straight into the kernel's parameter block.

The driver wants a descriptor at a 64-byte aligned address; the objects of cuda.bindings give no such promise, so the
call goes through ctypes into memory of our own.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_uint32, c_uint64, c_void_p

from megamoe_jit._device.params import TensorMap
from megamoe_jit._errors import LaunchError, ToolchainError
from megamoe_jit._spec.abi import BLOCK_K

# Values of the driver's enums (cuda.h).
_UINT8 = 0
_INTERLEAVE_NONE = 0
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3
_FILL_ZERO = 0


@functools.cache
def _encode() -> ctypes._NamedFuncPointer:
    try:
        encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise ToolchainError(f"the CUDA driver (libcuda.so.1, 12.0 or newer) cannot be used: {error}") from error
    encode.restype = ctypes.c_int
    return encode


def encode_fp8_rows(target: TensorMap, address: int, rows: int, columns: int, box_rows: int) -> None:
    """Describe a row-major matrix of bytes, read in boxes of `box_rows` x 128 under the 128-byte swizzle.

    Args:
        target: where to write the descriptor; 64-byte aligned.
        address: device address of the matrix, a multiple of 16.
        rows, columns: its size; `columns` is a multiple of 16.
        box_rows: rows of a box, at most 256.
    """
    dims = (c_uint64 * 2)(columns, rows)
    strides = (c_uint64 * 1)(columns)
    box = (c_uint32 * 2)(BLOCK_K, box_rows)
    steps = (c_uint32 * 2)(1, 1)
    status = _encode()(
        ctypes.byref(target),
        _UINT8,
        2,
        c_void_p(address),
        dims,
        strides,
        box,
        steps,
        _INTERLEAVE_NONE,
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        _FILL_ZERO,
    )
    if status != 0:
        raise LaunchError(
            f"cuTensorMapEncodeTiled gave error {status} for {rows} x {columns} bytes at {address:#x}; "
            "the address must be a multiple of 16"
        )
