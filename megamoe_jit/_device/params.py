"""The kernel's one argument, mirrored field by field from `kernels_src/layout/params.cuh`.

A test reads the struct out of that file and compares names, order and sizes; the loader also compares the size with
the parameter table inside the compiled kernel.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_uint32, c_uint64

from megamoe_jit._spec import MAX_RANKS

__all__ = ["PARAMS_ALIGN", "SIDE_WORDS", "Params", "TensorMap", "aligned_params"]

PARAMS_ALIGN = 64
SIDE_WORDS = 5  #: a bit for each of 160 SMs


class TensorMap(ctypes.Structure):
    """An opaque CUtensorMap, 128 bytes."""

    _fields_ = [("opaque", c_uint64 * 16)]


class Params(ctypes.Structure):
    """`megamoe::Params`.  Pointers are plain integers; offsets are bytes in the symmetric buffer."""

    _fields_ = [
        ("act1", TensorMap),
        ("act2", TensorMap),
        ("act1_small", TensorMap),
        ("act2_small", TensorMap),
        ("peers", c_uint64 * MAX_RANKS),
        ("x", c_uint64),
        ("x_scales", c_uint64),
        ("topk_ids", c_uint64),
        ("topk_weights", c_uint64),
        ("expert_offsets", c_uint64),
        ("sorted_pairs", c_uint64),
        ("signals", c_uint64),
        ("combine", c_uint64),
        ("act1_pool", c_uint64),
        ("act1_scales", c_uint64),
        ("act2_pool", c_uint64),
        ("act2_scales", c_uint64),
        ("row_pairs", c_uint64),
        ("act1_ready", c_uint64),
        ("act2_ready", c_uint64),
        ("act2_done", c_uint64),
        ("slice_counts", c_uint64),
        ("control", c_uint64),
        ("weight1", c_uint64),
        ("weight2", c_uint64),
        ("weight1_scales", c_uint64),
        ("weight2_scales", c_uint64),
        ("y", c_uint64),
        ("stats", c_uint64),
        ("fault", c_uint64),
        ("timeline", c_uint64),
        ("timeout_ns", c_uint64),
        ("tokens", c_uint32),
        ("rank", c_uint32),
        ("pool_rows", c_uint32),
        ("counters", c_uint32),
        ("sort_blocks", c_uint32),
        ("item_shift", c_uint32),
        ("lag_tiles", c_uint32),
        ("clamp", c_float),
        ("want_sides", c_uint32),
        ("side_of_sm", c_uint32 * SIDE_WORDS),
        ("raw_x", c_uint64),
        ("raw_ids", c_uint64),
        ("raw_weights", c_uint64),
        ("raw_x_stride", c_uint64),
        ("raw_ids_stride", c_uint32),
        ("raw_weights_stride", c_uint32),
        ("raw_formats", c_uint32),
        ("weight_factor", c_float),
    ]


def aligned_params() -> Params:
    """A zeroed `Params` at an address that is a multiple of 64, as its tensor maps need."""
    memory = (ctypes.c_char * (ctypes.sizeof(Params) + PARAMS_ALIGN))()
    offset = -ctypes.addressof(memory) % PARAMS_ALIGN
    return Params.from_buffer(memory, offset)
