"""Packed weights that are expanded in memory, on the host: where the kernel reads and writes, and when that is made."""

from __future__ import annotations

import pytest

import megamoe_jit as mm
from megamoe_jit._check.weights import make_weights
from megamoe_jit._device.params import Params
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._spec import MXFP4, Variant
from tests.unit.layer.test_calls import HERE, SHAPE, Cuda, call, cuda, refused  # noqa: F401

DRAWN = make_weights(SHAPE, "cpu", weights=MXFP4)
L1, L2 = mm.transform_weights_for_mega_moe_sm90(DRAWN.l1, DRAWN.l2)
CODES = 4 * 256 * 256, 4 * 256 * 128  #: bytes of both matrices once they are expanded
WORDS = 4 * (1 + 1)  #: counters: a tile of columns of each matrix of each expert


@pytest.fixture
def buffer(cuda: Cuda) -> SymmBuffer:  # noqa: F811
    return SymmBuffer(SHAPE, 128, HERE)


def read(params: Params) -> list[int]:
    """Where a kernel has packed codes, exponents and scales from."""
    return [
        getattr(params, name) for i in (1, 2) for name in (f"packed{i}", f"weight{i}_exponents", f"weight{i}_scales")
    ]


def test_a_kernel_that_expands_reads_from_where_it_has_expanded_to(cuda: Cuda, buffer: SymmBuffer):  # noqa: F811
    call(buffer, l1=L1, l2=L2, variant="prefill")
    (launch,) = cuda.launches
    params = launch.params
    assert (launch.spec.variant, launch.spec.weights) == (Variant.PREFILL, MXFP4)
    assert read(params) == [tensor.data_ptr() for tensor in (*L1, *L2)]
    assert (params.weight1, params.weight2) == (params.expanded1, params.expanded2)
    assert (params.expanded2 - params.expanded1, params.expanded - params.expanded2) == CODES
    assert params.expand_every == 3
    assert buffer.kernels.expanded.memory.numel() == sum(CODES) + 4 * WORDS


def test_a_kernel_with_helpers_reads_packed_weights_and_needs_no_room(cuda: Cuda, buffer: SymmBuffer):  # noqa: F811
    call(buffer, l1=L1, l2=L2, variant="unpack")
    params = cuda.launches[0].params
    assert (params.weight1, params.weight2) == (L1[0].data_ptr(), L2[0].data_ptr())
    assert (params.weight1_exponents, params.weight2_exponents) == (L1[1].data_ptr(), L2[1].data_ptr())
    assert (params.expanded1, params.expanded2, params.expanded, params.expand_every) == (0, 0, 0, 0)
    assert buffer.kernels.expanded is None


def test_all_kernels_of_a_buffer_expand_in_one_place(cuda: Cuda, buffer: SymmBuffer):  # noqa: F811
    for fast in (True, False, True):
        call(buffer, l1=L1, l2=L2, variant="prefill", fast_math=fast)
    assert len({launch.params.expanded1 for launch in cuda.launches}) == 1
    assert len({launch.spec for launch in cuda.launches}) == 2


def test_the_room_is_not_made_while_a_graph_is_captured(cuda: Cuda, buffer: SymmBuffer):  # noqa: F811
    other = SymmBuffer(SHAPE, 128, HERE)
    call(other, l1=L1, l2=L2, variant="prefill")
    call(buffer, l1=L1, l2=L2, variant="unpack")
    cuda.capturing = True
    call(other, l1=L1, l2=L2, variant="prefill")
    cuda.capturing = False
    buffer.prepare("prefill", weight_format="mxfp4")
    cuda.capturing = True
    call(buffer, l1=L1, l2=L2, variant="prefill")
    assert cuda.launches[-1].params.expanded1 != cuda.launches[0].params.expanded1


def test_memory_that_is_not_there_is_said_in_bytes(cuda: Cuda, buffer: SymmBuffer):  # noqa: F811
    cuda.out_of_memory = True
    wanted = f"{sum(CODES) + 4 * WORDS} bytes"
    refused(lambda: buffer.prepare("prefill", weight_format="mxfp4"), wanted, 'variant = "unpack"')
    assert cuda.launches == []


def test_streams_that_were_known_before_are_told_of_the_room(cuda: Cuda, buffer: SymmBuffer):  # noqa: F811
    """Else the allocator would give it away while a kernel of another stream still writes there."""
    call(buffer, l1=L1, l2=L2, variant="unpack")
    cuda.events.clear()
    buffer.prepare("prefill", weight_format="mxfp4")
    assert ("synchronize",) in cuda.events
    call(buffer, l1=L1, l2=L2, variant="prefill")
    room = buffer.kernels.expanded.memory.data_ptr()
    assert ("use", "A", room) in cuda.events
    cuda.stream = cuda.b
    call(buffer, l1=L1, l2=L2, variant="prefill")
    assert ("use", "B", room) in cuda.events
