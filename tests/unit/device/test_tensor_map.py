"""Descriptors: what the driver is asked for."""

from __future__ import annotations

import ctypes

import pytest
from cuda.bindings import driver

from megamoe_jit._device import tensor_map as _tma
from megamoe_jit._device.params import TensorMap
from megamoe_jit._errors import LaunchError


class Asked(list):
    """Stands in for `cuTensorMapEncodeTiled` and keeps its arguments."""

    status = 0

    def __call__(self, *arguments: object) -> int:
        self[:] = arguments
        return self.status


@pytest.fixture
def asked(monkeypatch) -> Asked:
    call = Asked()
    monkeypatch.setattr(_tma, "_encode", lambda: call)
    return call


def test_rows_of_bytes_in_swizzled_boxes(asked: Asked):
    _tma.encode_fp8_rows(TensorMap(), 0x7F0000000400, 384, 7168, 16)
    _, kind, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill = asked
    assert kind == driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8
    assert (rank, address.value) == (2, 0x7F0000000400)
    assert [list(numbers) for numbers in (sizes, strides, box, steps)] == [[7168, 384], [7168], [128, 16], [1, 1]]
    assert interleave == driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE
    assert swizzle == driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B
    assert promotion == driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B
    assert fill == driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
    assert isinstance(sizes, ctypes.Array)


def test_a_refusal_says_what_was_asked(asked: Asked):
    asked.status = 1
    with pytest.raises(LaunchError, match=r"error 1 for 384 x 7168 bytes at 0x8; .*multiple of 16"):
        _tma.encode_fp8_rows(TensorMap(), 8, 384, 7168, 16)
