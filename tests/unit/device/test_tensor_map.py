"""TMA descriptors: what the driver is asked for, held against its own names and against the kernels."""

from __future__ import annotations

import ctypes
import re
from ctypes import POINTER, c_int, c_uint32, c_uint64, c_void_p

import pytest
from cuda.bindings.driver import (
    CUtensorMapDataType,
    CUtensorMapFloatOOBfill,
    CUtensorMapInterleave,
    CUtensorMapL2promotion,
    CUtensorMapSwizzle,
)

from megamoe_jit._device import tensor_map as _tma
from megamoe_jit._device.params import Params, aligned
from megamoe_jit._errors import LaunchError
from tests import host

#: cuTensorMapEncodeTiled of cuda.h: target, type, rank, address, sizes, strides, box, steps, and four enums.
SIGNATURE = ctypes.CFUNCTYPE(
    c_int,
    *(c_void_p, c_int, c_uint32, c_void_p),
    *(POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint32), POINTER(c_uint32)),
    *(c_int, c_int, c_int, c_int),
)


class Driver:
    """Stands in for the driver's function, with its types; `answer` is what it returns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer, self.asked = 0, []
        self.function = SIGNATURE(self.encode)
        monkeypatch.setattr(_tma, "_encode", lambda: self.function)

    def encode(self, target, kind, rank, address, sizes, strides, box, steps, *enums) -> int:
        arrays = sizes[:rank], strides[: rank - 1], box[:rank], steps[:rank]
        self.asked.append((target, kind, rank, address, *arrays, *enums))
        return self.answer


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_a_descriptor_is_of_bytes_in_boxes_as_wide_as_the_swizzle(driver: Driver):
    params = aligned(Params)
    _tma.encode_fp8_rows(params.act2, 0x7F00_0000_1000, rows=5_000_000_000, columns=384, box_rows=16)
    assert driver.asked == [
        (
            ctypes.addressof(params.act2),
            CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            0x7F00_0000_1000,
            [384, 5_000_000_000],
            [384],
            [128, 16],
            [1, 1],
            CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,  # zeros
        )
    ]


def test_the_matrix_cores_read_under_the_same_swizzle():
    """Bits 62 and 63 of a matrix descriptor: 1 is the swizzle of 128 bytes."""
    assert re.findall(r"u64\((\d+)\) << 62", host.room("ptx/wgmma.cuh")) == ["1"]


def test_a_refusal_says_what_was_asked_for(driver: Driver):
    driver.answer = 1
    with pytest.raises(LaunchError, match="cuTensorMapEncodeTiled gave error 1 for 4 x 256 bytes at 0x1008"):
        _tma.encode_fp8_rows(aligned(Params).act1, 0x1008, 4, 256, 64)
