"""The parameter block: ctypes has the offsets of the compiler, and it lies where a launch can read it."""

from __future__ import annotations

import ctypes

import pytest

from megamoe_jit._device.params import NodesParams, Params, StageParams, TensorMap, aligned, side_by_side
from megamoe_jit._spec import abi
from megamoe_jit._spec.abi import PARAMS_ALIGN

KINDS = {Params: "PARAMS", StageParams: "STAGE_PARAMS", NodesParams: "NODES_PARAMS"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_lies_where_the_compiler_has_it(kind: type[ctypes.Structure]):
    members, size, align = (getattr(abi, KINDS[kind] + what) for what in ("", "_BYTES", "_ALIGN"))
    assert (ctypes.sizeof(kind), align) == (size, PARAMS_ALIGN)
    assert [(name, getattr(kind, name).offset) for name, _ in kind._fields_] == [
        (name, offset) for name, _, _, offset in members
    ]
    ends = [getattr(kind, name).offset + getattr(kind, name).size for name, _ in kind._fields_]
    assert ends == [*(offset for *_, offset in members[1:]), size]
    assert ctypes.sizeof(TensorMap) == 128


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_aligned_and_zero(kind: type[ctypes.Structure]):
    for params in [aligned(kind) for _ in range(8)]:
        assert ctypes.addressof(params) % PARAMS_ALIGN == 0
        assert bytes(params) == bytes(ctypes.sizeof(kind))


def test_tensor_maps_lie_where_the_hardware_reads_them():
    maps = [name for name, kind in Params._fields_ if kind is TensorMap]
    assert len(maps) == 4
    assert all(getattr(Params, name).offset % 64 == 0 for name in maps)


def test_fields_that_are_side_by_side_are_packed_at_once():
    params, (packer, at) = (
        aligned(Params),
        side_by_side("raw_ids_stride", "raw_weights_stride", "raw_formats", "weight_factor"),
    )
    packer.pack_into(params, at, 1, 2**32 - 1, 3, 2.5)
    found = params.raw_ids_stride, params.raw_weights_stride, params.raw_formats, params.weight_factor
    assert found == (1, 2**32 - 1, 3, 2.5)
    assert (params.raw_x_stride, packer.size) == (0, 16)


@pytest.mark.parametrize("names", [("raw_x", "raw_weights"), ("raw_ids", "raw_x"), ("y", "tokens")])
def test_fields_that_are_not_side_by_side_are_not(names: tuple[str, ...]):
    with pytest.raises(ValueError, match="not side by side"):
        side_by_side(*names)
