"""A layer on the host: the sizes and arguments it refuses, its memory, and what `MegaMoE` brings to the kernel.

The kernel's part is done by the reference, on what it finds at the addresses that it is given.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._device.params import Params
from megamoe_jit._layer import buffer as _buffer
from megamoe_jit._layer import group as _ranks
from megamoe_jit._layer import memory as _memory
from megamoe_jit._layer import workspace as _workspace
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.checks import check_device
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import FORMATS, KernelSpec, MoEShape, Variant
from megamoe_jit._spec.abi import Wait
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit._spec.numerics import Numerics
from megamoe_jit.reference import moe_reference
from tests.unit.layer.test_calls import DRAWN, GARBAGE, HERE, L1, L2, SHAPE, STATS, Cuda, call, refused, uses

FP8, F32 = torch.float8_e4m3fn, torch.float32
#: By bits of `RawFormats` in kernels_src/stage/inputs.cuh.
IDS = {0: torch.int32, 1: torch.int64}
WEIGHTS = {0: F32, 2: torch.bfloat16, 4: torch.float16}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


@pytest.fixture
def buffer(cuda: Cuda) -> SymmBuffer:
    return SymmBuffer(SHAPE, 128, HERE)


@pytest.fixture
def shared(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[SymmBuffer]:
    """The buffer of the second of two ranks, which are alike."""

    def alike(group: object, value: object) -> list[object]:
        return [value] * _ranks.group_size(group)

    def allocate(group: object, size: int, *_: object) -> tuple[torch.Tensor, SimpleNamespace]:
        return torch.empty(size, dtype=torch.uint8), SimpleNamespace(buffer_ptrs=[64, 128])

    monkeypatch.setattr(_ranks, "gather", alike)
    monkeypatch.setattr(_buffer, "gather", alike)
    monkeypatch.setattr(_memory, "allocate_symmetric", allocate)
    with SymmBuffer(SHAPE, 128, HERE, SimpleNamespace(size=lambda: 2, rank=lambda: 1)) as it:
        cuda.events.clear()
        yield it


def bf16(*sizes: int) -> torch.Tensor:
    return torch.zeros(*sizes, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"y": bf16(3, 256).half()}, "y has dtype torch.float16; allowed: torch.bfloat16"),
        ({"y": bf16(3, 128)}, "y has shape (3, 128); allowed: (3, 256)"),
        ({"y": bf16(3, 256).to("meta")}, "y is on meta; allowed: cpu, where the buffer is"),
        ({"y": bf16(3, 512)[:, ::2]}, "y has strides (512, 2); allowed: contiguous"),
        ({"y": bf16(3 * 256 + 1)[1:].view(3, 256)}, "allowed: an address that is a multiple of 16"),
        ({"y": bf16(129, 256)}, "y has 129 rows; allowed: at most the buffer's 128 tokens"),
        ({"cumulative_local_expert_recv_stats": STATS.long()}, "recv_stats has dtype torch.int64; allowed"),
        ({"cumulative_local_expert_recv_stats": STATS[:3]}, "recv_stats has shape (3,); allowed: (4,)"),
        ({"cumulative_local_expert_recv_stats": STATS.to("meta")}, "recv_stats is on meta; allowed: cpu"),
        ({"l1": L2, "l2": L1}, "l1 weights has shape (4, 256, 128); allowed: (4, 256, 256)"),
        ({"l1": (L1[0], L1[1][:, :1].contiguous())}, "l1 scales has shape (4, 1, 2); allowed: (4, 2, 2)"),
        ({"l2": (L2[0].view(torch.uint8), L2[1])}, "l2 weights has dtype torch.uint8; allowed"),
        ({"l2": (L2[0], L2[1].double())}, "l2 scales has dtype torch.float64; allowed"),
        ({"num_sms": 133}, "num_sms = 133 is not supported; allowed: 1 to 132"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_launched(cuda: Cuda, buffer: SymmBuffer, wrong: dict, says: str):
    refused(lambda: call(buffer, **wrong), says)
    assert cuda.launches == []


def test_as_many_tokens_as_the_buffer_holds_and_counters_at_any_word_are_taken(cuda: Cuda, buffer: SymmBuffer):
    counters = torch.zeros(5, dtype=torch.int32)[1:]
    call(buffer, 128, cumulative_local_expert_recv_stats=counters)
    call(buffer, 0)
    assert [launch.params.tokens for launch in cuda.launches] == [128, 0]
    assert [launch.params.stats for launch in cuda.launches] == [counters.data_ptr(), 0]


@pytest.mark.parametrize("bad", [-2, 4, 2**40, -(2**40)])
def test_debug_mode_alone_refuses_an_id_that_is_no_expert(cuda: Cuda, buffer: SymmBuffer, bad: int):
    buffer.topk_idx[:4] = torch.tensor([[0, -1], [3, 1], [2, 2], [bad, bad]])
    with override(debug=True):
        call(buffer)
        buffer.topk_idx[1, 0] = bad
        refused(lambda: call(buffer), f"topk_idx[1, 0] = {bad} is not an expert; allowed: -1 (masked) or 0 to 3")
        assert len(cuda.launches) == 1
    call(buffer)
    assert len(cuda.launches) == 2


@pytest.mark.parametrize("clamp", [-1.0, 1e39, True, math.nan, -math.inf])
def test_a_clamp_that_is_no_bound_is_refused(cuda: Cuda, buffer: SymmBuffer, clamp: float):
    refused(lambda: call(buffer, activation_clamp=clamp), f"activation_clamp = {clamp!r} is not supported")
    assert cuda.launches == []


@pytest.mark.parametrize("clamp", [0, 0.0, 1e-46, 10, 3.4e38, math.inf, np.float32(2.5), Fraction(5, 2)])
def test_a_clamp_is_any_number_from_0_that_float32_holds(cuda: Cuda, buffer: SymmBuffer, clamp: float):
    call(buffer, activation_clamp=clamp)
    assert cuda.launches[0].params.clamp == np.float32(float(clamp))


@pytest.mark.parametrize("capability", [(7, 5), (8, 9), (9, 1), (10, 0), (12, 0), (9, 0)])
def test_compute_capability_is_9_0_and_no_other(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    check, device = check_device.__wrapped__, torch.device("cuda", 0)  # remembers nothing
    if capability == (9, 0):
        check(device)
    else:
        says = "GPU X has compute capability {}.{}; these kernels need 9.0".format(*capability)
        refused(lambda: check(device), says, kind=mm.UnsupportedDeviceError)


def test_the_device_of_a_buffer_is_checked():
    refused(lambda: SymmBuffer(SHAPE, 128, HERE), "device = cpu is not supported; allowed: a CUDA device")


@pytest.mark.parametrize("option", ["fast_math", "timeline"])
@pytest.mark.parametrize("value", ["false", 1, 0, None])
def test_switches_of_a_kernel_are_bools(option: str, value: object):
    refused(lambda: KernelSpec(SHAPE, Variant.PINGPONG, **{option: value}), f"{option} = {value!r}", "True or False")


def test_sizes_of_a_buffer_end_where_the_kernels_do(cuda: Cuda):
    small = MoEShape(128, 128, 1, 1)
    for tokens in (0, -1, 32769):
        refused(lambda t=tokens: SymmBuffer(small, t, HERE), f"num_max_tokens_per_rank = {tokens}", "1 to 32768")
    refused(lambda: SymmBuffer(small, 1, HERE, None, 4095), "max_pool_rows = 4095", "allowed: 4096 or more")
    for tokens, capacity in ((1, 128), (32768, 32768)):
        assert SymmBuffer(small, tokens, HERE, None, 4096).num_max_tokens_per_rank == capacity


def test_a_buffer_takes_what_is_free_and_what_torch_keeps_but_no_more(cuda: Cuda, buffer: SymmBuffer):
    need = buffer.layout.total_bytes
    cuda.free, cuda.reserved, cuda.allocated = need - 10, 15, 5
    SymmBuffer(SHAPE, 128, HERE)
    cuda.allocated = 6
    refused(lambda: SymmBuffer(SHAPE, 128, HERE), f"needs {need} bytes", f"has {need - 1} free", "fewer tokens")


def test_an_allocation_that_fails_is_an_error_of_the_arguments(cuda: Cuda):
    cuda.out_of_memory = True
    with pytest.raises(mm.ConfigError, match=r"needs \d+ bytes: CUDA out of memory. Tried to allocate 2 MiB; allowed"):
        SymmBuffer(SHAPE, 128, HERE)


def test_words_that_launches_count_in_are_zero_before_anything_else_runs(cuda: Cuda):
    it = SymmBuffer(SHAPE, 128, HERE)
    assert cuda.events == [("synchronize",)]
    for memory, name in ((it.buffer, "signals"), (it.local, "control")):
        section = it.layout.section(name)
        assert not memory[section.offset : section.offset + section.bytes].any()
    assert (it.local[: it.layout.section("control").offset] == GARBAGE).all(), "the stand-in of fresh memory"


def test_a_rank_counts_and_computes_its_own_experts(cuda: Cuda, shared: SymmBuffer):
    own = {name: (codes[2:], scales[2:]) for name, (codes, scales) in (("l1", L1), ("l2", L2))}
    refused(lambda: call(shared, **own, cumulative_local_expert_recv_stats=STATS), "has shape (4,); allowed: (2,)")
    refused(lambda: call(shared), "l1 weights has shape (4, 256, 256); allowed: (2, 256, 256)")
    cuda.capturing = True
    refused(lambda: call(shared, **own), "prepare('pingpong', fast_math=True)", kind=mm.CaptureError)
    assert shared.kernels.bound == {}, "a first call that one rank refuses prepares nothing on any"
    cuda.capturing = False
    call(shared, **own, cumulative_local_expert_recv_stats=STATS[:2])
    (launch,) = cuda.launches
    assert (launch.spec.ranks, launch.params.rank, launch.params.peers[:3]) == (2, 1, [64, 128, 0])
    stored, taken = FORMATS["fp8"], (Variant.PINGPONG, Variant.COOPERATIVE)  # by `auto`
    assert set(shared.kernels.bound) == {(variant, Numerics(), Inputs.STAGED, stored) for variant in taken}
    assert cuda.events == [uses(shared, "A")[0], ("launch", "A")], "symmetric memory is not torch's"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[SymmBuffer]:
    """The buffers of the layers so far."""
    buffers: list[SymmBuffer] = []
    real = _workspace.get_symm_buffer_for_mega_moe

    def keep(*sizes: object, **more: object) -> SymmBuffer:
        buffers.append(real(*sizes, **more))
        return buffers[-1]

    monkeypatch.setattr(_workspace, "get_symm_buffer_for_mega_moe", keep)
    return buffers


def layer(**more: object) -> mm.MegaMoE:
    return mm.MegaMoE(DRAWN.l1, DRAWN.l2, **{"topk": 2, "max_tokens": 128, **more})


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.arange(2 * tokens).view(tokens, 2) % 5 - 1
    return torch.randn(tokens, 256).bfloat16(), ids, torch.rand(tokens, 2) + 0.5


def expected(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, clamp: float | None) -> torch.Tensor:
    return moe_reference(*mm.quantize_activations(x), ids, weights, DRAWN.l1, DRAWN.l2, activation_clamp=clamp)


def in_chunks(function: Callable[..., torch.Tensor], *batch: torch.Tensor, size: int = 128) -> torch.Tensor:
    """What `function` gives for each `size` tokens of a batch, as a layer of that capacity serves it.

    For a stand-in this is not the same as one call: a product on the CPU has other bits where an expert has one row, or
    few, than where these are among many. The kernel computes each row alike.
    """
    return torch.cat([function(*rows) for rows in zip(*(each.split(size) for each in batch), strict=True)])


def at(address: int, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    """The tensor that a kernel sees there."""
    if math.prod(sizes) == 0:
        return torch.empty(sizes, dtype=dtype)
    assert address > 0
    memory = (ctypes.c_uint8 * (math.prod(sizes) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(sizes)


def compute(params: Params) -> None:
    """What the kernel does."""
    tokens, base = params.tokens, params.peers[0]
    if params.raw_x:
        quantise(params)
    read = (
        at(base + params.x, FP8, tokens, 256),
        at(base + params.x_scales, F32, tokens, 2),
        at(base + params.topk_ids, torch.int64, tokens, 2),
        at(base + params.topk_weights, F32, tokens, 2),
    )
    l1 = at(params.weight1, FP8, 4, 256, 256), at(params.weight1_scales, F32, 4, 2, 2)
    l2 = at(params.weight2, FP8, 4, 256, 128), at(params.weight2_scales, F32, 4, 2, 1)
    mm.mark_transformed(l1, l2)
    weights = mm.inverse_transform_weights_for_mega_moe_sm90(l1, l2)
    at(params.y, torch.bfloat16, tokens, 256).copy_(moe_reference(*read, *weights, activation_clamp=params.clamp))


def rows(address: int, dtype: torch.dtype, tokens: int, columns: int, stride: int) -> torch.Tensor:
    """Rows that are `stride` numbers apart."""
    return at(address, dtype, tokens and (tokens - 1) * stride + columns).as_strided((tokens, columns), (stride, 1))


def quantise(params: Params, hidden: int = 256, topk: int = 2) -> None:
    """What the head of a kernel does whose inputs are the caller's."""
    tokens, base = params.tokens, params.peers[0]
    ids, weights = IDS[params.raw_formats & 1], WEIGHTS[params.raw_formats & 6]
    codes, scales = mm.quantize_activations(
        rows(params.raw_x, torch.bfloat16, tokens, hidden, params.raw_x_stride // 2)
    )
    at(base + params.x, FP8, tokens, hidden).copy_(codes)
    at(base + params.x_scales, F32, tokens, hidden // 128).copy_(scales)
    at(base + params.topk_ids, torch.int64, tokens, topk).copy_(
        rows(params.raw_ids, ids, tokens, topk, params.raw_ids_stride)
    )
    routed = rows(params.raw_weights, weights, tokens, topk, params.raw_weights_stride).float() * params.weight_factor
    at(base + params.topk_weights, F32, tokens, topk).copy_(routed)


@pytest.mark.parametrize("clamp", [None, 0.02])
def test_a_layer_brings_all_its_inputs_and_its_clamp_to_the_kernel(cuda: Cuda, clamp: float | None):
    cuda.kernel = compute
    it = layer(clamp=clamp)
    for tokens in (20, 3):
        given = inputs(tokens)
        assert torch.equal(it(*given), expected(*given, clamp))
    assert not torch.equal(expected(*given, None), expected(*given, 0.02)), "the clamp matters"


@pytest.mark.parametrize("fast", [False, True])
def test_a_layer_takes_the_kernel_of_its_mathematics(cuda: Cuda, fast: bool):
    layer(fast_math=fast)(*inputs(3))
    assert cuda.launches[0].spec == KernelSpec(SHAPE, Variant.PINGPONG, 1, fast, inputs=Inputs.RAW)


def test_a_layer_orders_a_pair_where_it_is_only_if_told_to(cuda: Cuda):
    drawn = DRAWN.l1[0], DRAWN.l2[0]
    codes = [given.clone() for given in drawn]
    pairs = (codes[0], DRAWN.l1[1]), (codes[1], DRAWN.l2[1])
    kept = mm.MegaMoE(*pairs, topk=2, max_tokens=128)
    mixed = mm.MegaMoE(mm.dequantize_weights(*DRAWN.l1), pairs[1], topk=2, max_tokens=128)
    assert [same(a, b) for a, b in zip(codes, drawn, strict=True)] == [True, True]
    inplace = mm.MegaMoE(*pairs, topk=2, max_tokens=128, inplace=True)
    assert inplace.l1[0].data_ptr() == codes[0].data_ptr() != kept.l1[0].data_ptr()
    assert inplace.l2[0].data_ptr() == codes[1].data_ptr() != mixed.l2[0].data_ptr()
    assert all(same(it.l1[0], L1[0]) for it in (kept, inplace))
    assert all(same(it.l2[0], L2[0]) for it in (kept, inplace, mixed))


def shifted(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """The same values, from another address on."""
    size = tensor.numel() * tensor.itemsize
    memory = bytearray(size + 64)
    at = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=-at % 16 + by).view(tensor.shape)
    copy.view(torch.uint8).copy_(tensor.view(torch.uint8))
    return copy


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, with gaps between rows."""
    wide = torch.zeros(*tensor.shape[:2], tensor.shape[2] + 128, dtype=torch.uint8).view(tensor.dtype)
    wide.view(torch.uint8)[..., : tensor.shape[2]].copy_(tensor.view(torch.uint8))
    return wide[..., : tensor.shape[2]]


def spread_scales(scales: torch.Tensor) -> torch.Tensor:
    """The same values, none next to another."""
    return torch.stack([scales] * 2, dim=-1)[..., 0]


@pytest.mark.parametrize(
    ("change", "said"), [(lambda w: shifted(w, 8), "allowed: an address that is"), (spread, "allowed: contiguous")]
)
@pytest.mark.parametrize("which", [0, 1])
def test_codes_that_a_call_would_refuse_are_not_written_over(cuda: Cuda, change, said: str, which: int):
    pairs = [(DRAWN.l1[0].clone(), DRAWN.l1[1]), (DRAWN.l2[0].clone(), DRAWN.l2[1])]
    pairs[which] = change(pairs[which][0]), pairs[which][1]
    refused(lambda: mm.MegaMoE(*pairs, topk=2, max_tokens=128, inplace=True), ("w13 codes", "w2 codes")[which], said)
    assert all(same(codes, drawn) for (codes, _), drawn in zip(pairs, (DRAWN.l1[0], DRAWN.l2[0]), strict=True))
    mm.MegaMoE(*pairs, topk=2, max_tokens=128)  # a copy has neither fault


@pytest.mark.parametrize("change", [spread_scales, lambda sf: shifted(sf, 4), lambda sf: shifted(sf, 2)])
@pytest.mark.parametrize("inplace", [False, True])
def test_scales_of_any_place_are_taken(cuda: Cuda, change, inplace: bool):
    codes, scales = DRAWN.l2[0].clone(), change(DRAWN.l2[1])
    it = mm.MegaMoE((DRAWN.l1[0].clone(), DRAWN.l1[1]), (codes, scales), topk=2, max_tokens=128, inplace=inplace)
    it(*inputs(3))
    assert len(cuda.launches) == 1
    assert torch.equal(it.l2[1], DRAWN.l2[1])


def test_a_layer_without_weights_keeps_no_memory(cuda: Cuda, made: list[SymmBuffer]):
    refused(
        lambda: mm.MegaMoE((DRAWN.l1[0], DRAWN.l1[1].half()), DRAWN.l2, topk=2, max_tokens=128), "w13 scales has dtype"
    )
    assert len(made) == 1
    refused(made[0].require_usable, "this buffer was destroyed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_staging_on_another_stream_waits_for_the_last_call(cuda: Cuda, dtype: torch.dtype):
    it = layer()
    for tokens in (3, 4):
        cuda.events.clear()
        x, ids, weights = inputs(tokens)
        it(x.to(dtype), ids, weights)
        cuda.stream = cuda.b
    launches = [("launch", "B")] if dtype is torch.bfloat16 else [("stage", "B"), ("launch", "B")]
    assert cuda.events == [("wait", "B", "A"), *uses(it.buffer, "B"), *launches]


def test_nothing_is_staged_into_a_buffer_that_is_gone_or_failed(cuda: Cuda):
    gone, failed = layer(workspace="own"), layer()
    gone.destroy()
    failed.buffer.fault[:4] = torch.tensor([Wait.PEER_SIGNAL | 2 << 8, 0, 5, 0b10])
    refused(failed.check, "missing: rank 1", kind=mm.PeerTimeoutError)
    cuda.events.clear()
    refused(lambda: gone.stage(*inputs(3)), "this buffer was destroyed")
    refused(lambda: failed.stage(*inputs(3)), "unusable since an earlier call failed", kind=mm.PeerTimeoutError)
    assert cuda.events == []
    assert (failed.buffer.x.view(torch.uint8) == GARBAGE).all()


def test_no_graph_of_autograd_grows(cuda: Cuda):
    """Every staged call would add to it, and weights would keep what they were made of."""
    w13, w2 = (torch.nn.Parameter(torch.randn(4, *size)) for size in ((256, 256), (256, 128)))
    it = mm.MegaMoE(w13, w2, topk=2, max_tokens=128)
    x, weights = (torch.randn(3, n, dtype=torch.bfloat16, requires_grad=True) for n in (256, 2))
    it.stage(x, torch.zeros(3, 2, dtype=torch.int64), weights)
    it(x, torch.zeros(3, 2, dtype=torch.int64), weights)
    views = (it.buffer.x, it.buffer.x_sf, it.buffer.topk_idx, it.buffer.topk_weights)
    for tensor in (*it.l1, *it.l2, *views, *mm.quantize_weights(w2), *mm.quantize_activations(x)):
        assert (tensor.requires_grad, tensor.grad_fn) == (False, None)


def test_a_layer_made_in_inference_mode_is_staged_outside(cuda: Cuda):
    with torch.inference_mode():
        it = SymmBuffer(SHAPE, 128, HERE)
    it.topk_weights[:3].copy_(torch.ones(3, 2))
    assert not it.x.is_inference()


def test_ids_are_not_looked_at_in_a_capture(cuda: Cuda, buffer: SymmBuffer):
    buffer.prepare_all()
    buffer.topk_idx.fill_(99)
    with override(debug=True):
        refused(lambda: call(buffer), "99")
        cuda.capturing = True
        call(buffer)
    assert len(cuda.launches) == 1


def test_buffers_of_several_ranks_come_one_after_the_other(cuda: Cuda, shared: SymmBuffer):
    """On two streams they could start in another order than on the other rank, and wait for each other."""
    with SymmBuffer(SHAPE, 128, HERE, shared.group) as other:
        own = {"l1": (L1[0][:2], L1[1][:2]), "l2": (L2[0][:2], L2[1][:2])}
        cuda.events.clear()
        call(shared, **own)
        cuda.stream = cuda.b
        call(other, **own)
        cuda.stream = cuda.a
        call(shared, **own)
        assert [event for event in cuda.events if event[0] != "use"] == [
            ("launch", "A"), ("wait", "B", "A"), ("launch", "B"), ("wait", "A", "B"), ("launch", "A"),
        ]  # fmt: skip
        assert ("use", "B", other.local.data_ptr()) in cuda.events


def test_symmetric_memory_does_not_count_on_torchs_cache(cuda: Cuda, shared: SymmBuffer):
    layout = shared.layout
    cuda.free, cuda.reserved = layout.symmetric_bytes - 1, 1 << 40
    refused(
        lambda: SymmBuffer(SHAPE, 128, HERE, shared.group), f"{layout.symmetric_bytes} of them symmetric", "free beside"
    )
    assert cuda.events[-1] == ("empty cache",)
    cuda.free = layout.symmetric_bytes
    SymmBuffer(SHAPE, 128, HERE, shared.group).destroy()
