"""Shared experts on the host: which weights and numbers reach the kernel, and what is refused.

The kernel's part is done by the reference, with slots for the shared experts, on what it finds at its addresses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._check.scenarios import Weights, make_weights
from megamoe_jit._device.params import Params
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.from_bf16 import mega_moe_from_bf16
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit.reference import moe_reference, with_shared_experts
from tests.unit.layer.test_calls import HERE, STATS, Cuda, call, refused
from tests.unit.layer.test_moe import F32, FP8, at, cuda, in_chunks, inputs, quantise, same, shared  # noqa: F401
from tests.unit.layer.test_stage import stage as stage_apart

SHAPE = MoEShape(256, 128, 4, 2, shared=2)
DRAWN = make_weights(SHAPE, "cpu")  # four experts of the router, two shared ones
ORDERED = mm.transform_weights_for_mega_moe_sm90(DRAWN.l1, DRAWN.l2)
Pair = tuple[torch.Tensor, torch.Tensor]


def part(pair: Pair, which: slice) -> Pair:
    codes, scales = pair
    return codes[which].clone(), scales[which].clone()


def join(a: Pair, b: Pair) -> Pair:
    """One behind the other."""
    return tuple(torch.cat((x.view(torch.uint8), y.view(torch.uint8))).view(x.dtype) for x, y in zip(a, b, strict=True))


ROUTED, SHARED = ([part(pair, which) for pair in (DRAWN.l1, DRAWN.l2)] for which in (slice(4), slice(4, None)))


def compute(params: Params) -> None:
    """What the kernel does."""
    tokens, base = params.tokens, params.peers[0]
    if params.raw_x:
        quantise(params)
    ids, weights = at(base + params.topk_ids, torch.int64, tokens, 2), at(base + params.topk_weights, F32, tokens, 2)
    read = at(base + params.x, FP8, tokens, 256), at(base + params.x_scales, F32, tokens, 2)
    l1 = at(params.weight1, FP8, 6, 256, 256), at(params.weight1_scales, F32, 6, 2, 2)
    l2 = at(params.weight2, FP8, 6, 256, 128), at(params.weight2_scales, F32, 6, 2, 1)
    mm.mark_transformed(l1, l2)
    plain = mm.inverse_transform_weights_for_mega_moe_sm90(l1, l2)
    slots = with_shared_experts(ids, weights, 4, 2, shared_weight=params.shared_weight)
    at(params.y, torch.bfloat16, tokens, 256).copy_(moe_reference(*read, *slots, *plain, activation_clamp=params.clamp))


@pytest.fixture(autouse=True)
def kernel(cuda: Cuda) -> Cuda:  # noqa: F811
    cuda.kernel, cuda.stage = compute, stage_apart
    return cuda


def layer(**more: Any) -> mm.MegaMoE:
    pairs = {"shared_w13": SHARED[0], "shared_w2": SHARED[1], "topk": 2, "max_tokens": 128}
    return mm.MegaMoE(*ROUTED, **{**pairs, **more})


def whole(**more: Any) -> mm.MegaMoE:
    """The same layer of weights that come together."""
    return mm.MegaMoE(DRAWN.l1, DRAWN.l2, **{"num_shared_experts": 2, "topk": 2, "max_tokens": 128, **more})


def expected(batch: tuple[torch.Tensor, ...], weight: float = 1.0, drawn: Any = DRAWN) -> torch.Tensor:
    """The router's part and that of both shared experts."""
    x, ids, weights = batch
    more = torch.tensor([4, 5]).expand(len(x), 2)
    slots = torch.cat((ids, more), 1), torch.cat((weights, torch.full((len(x), 2), weight)), 1)
    return moe_reference(*mm.quantize_activations(x), *slots, drawn.l1, drawn.l2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight", [1.0, 0.25, -2])
@pytest.mark.parametrize("make", [layer, whole])
def test_every_token_goes_to_the_shared_experts_too(make: Callable, weight: float, dtype: torch.dtype):
    it = make(shared_weight=weight)
    for tokens in (20, 3, 0, 300):  # the last in chunks
        x, ids, weights = inputs(tokens)
        y = in_chunks(lambda *rows: expected(rows, weight), x, ids, weights)
        assert torch.equal(it(x.to(dtype), ids, weights), y)


def test_a_token_that_the_router_sends_nowhere_goes_to_them_all_the_same():
    x, ids, weights = inputs(5)
    ids[1:3], ids[4] = -1, 4  # which is no expert of the router
    y = layer()(x, ids, weights)
    assert torch.equal(y, expected((x, torch.where(ids < 4, ids, -1), weights)))
    assert y.abs().amax(1).min() > 0


def test_the_kernel_is_one_for_shared_experts(kernel: Cuda):
    layer()(*inputs(3))
    assert kernel.launches[0].spec == KernelSpec(SHAPE, Variant.PINGPONG, inputs=Inputs.RAW)
    assert len(kernel.launches) == 1
    assert kernel.stages == []


def test_a_scaling_factor_is_the_routers_alone():
    x, ids, weights = inputs(7)
    it = layer(shared_weight=0.5)
    y = mega_moe_from_bf16(
        x, ids, weights, it.l1, it.l2, it.buffer, routed_scaling_factor=2.5, shared_weight=it.shared_weight
    )
    assert torch.equal(y, expected((x, ids, weights * 2.5), 0.5))


def test_values_are_quantised_like_the_others():
    values = [mm.dequantize_weights(*pair) for pair in (*ROUTED, *SHARED)]
    it = mm.MegaMoE(values[0], ROUTED[1], shared_w13=values[2], shared_w2=values[3], topk=2, max_tokens=128)
    given = inputs(9)
    w13, _, shared_w13, shared_w2 = (mm.quantize_weights(each) for each in values)
    drawn = Weights(join(w13, shared_w13), join(ROUTED[1], shared_w2))
    assert torch.equal(it(*given), expected(given, drawn=drawn))


# -- weights in files and in place ---------------------------------------------------------------------------------


KEYS = ["w13", "w13_scales", "w2", "w2_scales", *(f"shared_{n}" for n in ("w13", "w13_scales", "w2", "w2_scales"))]


def test_a_state_dict_keeps_them_apart():
    state = layer().state_dict()
    assert list(state) == KEYS
    for pair, name in zip((*ROUTED, *SHARED), KEYS[::2], strict=True):
        assert same(state[name], pair[0])
        assert torch.equal(state[f"{name}_scales"], pair[1])


def test_a_state_dict_fills_another_layer():
    zeros = [(torch.zeros_like(codes.view(torch.uint8)).view(FP8), scales) for codes, scales in (*ROUTED, *SHARED)]
    it = mm.MegaMoE(*zeros[:2], shared_w13=zeros[2], shared_w2=zeros[3], topk=2, max_tokens=128)
    state = layer().state_dict()
    it.load_state_dict(state)
    given = inputs(11)
    assert torch.equal(it(*given), expected(given))
    with pytest.raises(RuntimeError, match=r'Missing key.*"shared_w2", "shared_w2_scales"'):
        it.load_state_dict({name: state[name] for name in KEYS[:6]})
    plain = mm.MegaMoE(*ROUTED, topk=2, max_tokens=128)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"shared_w13"'):
        plain.load_state_dict(state)


def test_weights_are_exchanged_where_they_are():
    it, given = layer(), inputs(11)
    places = [tensor.data_ptr() for tensor in (*it.l1, *it.l2)]
    other = make_weights(SHAPE, "cpu", seed=1)
    routed, more = ([part(pair, which) for pair in (other.l1, other.l2)] for which in (slice(4), slice(4, None)))
    it.load_weights(*routed)
    joined = Weights(*(join(a, b) for a, b in zip(routed, SHARED, strict=True)))
    assert torch.equal(it(*given), expected(given, drawn=joined)), "the shared ones stay"
    it.load_weights(*routed, *more)
    assert torch.equal(it(*given), expected(given, drawn=other))
    assert [tensor.data_ptr() for tensor in (*it.l1, *it.l2)] == places


def test_what_does_not_fit_is_not_loaded():
    it = layer()
    before = it.l1_codes.clone()
    refused(lambda: it.load_weights(DRAWN.l1, DRAWN.l2), "w13 has shape (6, 256, 256); allowed: (4, 256, 256)")
    refused(lambda: it.load_weights(*ROUTED, ROUTED[0]), "shared_w13 has shape (4, 256, 256); allowed: (2, 256, 256)")
    plain = mm.MegaMoE(*ROUTED, topk=2, max_tokens=128)
    refused(
        lambda: plain.load_weights(*ROUTED, *SHARED), "shared_w13 was given; allowed: None, the layer has no shared"
    )
    assert same(before, it.l1_codes)


def test_in_place_where_they_come_together():
    pairs = [part(pair, slice(None)) for pair in (DRAWN.l1, DRAWN.l2)]
    it = mm.MegaMoE(*pairs, num_shared_experts=2, topk=2, max_tokens=128, inplace=True)
    assert it.l1[0].data_ptr() == pairs[0][0].data_ptr()
    assert same(it.l1[0], ORDERED[0][0])
    refused(lambda: layer(inplace=True), "inplace = True with shared_w13; allowed: w13 and w2 that end with the shared")


def test_copies_names_and_workspaces():
    it, given = layer(shared_weight=0.5), inputs(4)
    assert "topk=2, num_shared_experts=2, shared_weight=0.5, capacity" in repr(it)
    assert torch.equal(copy.deepcopy(it)(*given), expected(given, 0.5))
    plain = mm.MegaMoE(*ROUTED, topk=2, max_tokens=128)
    assert "shared" not in repr(plain).replace("workspace=shared", "")
    assert plain.buffer is not it.buffer
    assert layer().buffer is it.buffer
    op = torch.ops.megamoe_jit.moe(*given, *it.l1, *it.l2, it._workspace, None, True, 0.5)
    assert torch.equal(op, expected(given, 0.5))


# -- the raw call --------------------------------------------------------------------------------------------------


def test_views_and_counters_are_the_routers(kernel: Cuda):
    it = mm.get_symm_buffer_for_mega_moe(None, 4, 128, 2, 256, 128, 2, device=HERE)
    assert (it.shape, it.num_experts, it.num_topk, it.num_shared_experts) == (SHAPE, 4, 2, 2)
    assert it.topk_idx.shape == it.topk_weights.shape == (128, 2)
    x, ids, weights = inputs(3)
    assert mm.stage(it, x, ids, weights) == 3
    y = call(it, l1=ORDERED[0], l2=ORDERED[1], cumulative_local_expert_recv_stats=STATS, shared_weight=3.0)
    assert torch.equal(y, expected((x, ids, weights), 3.0))
    more = torch.zeros(6, dtype=torch.int32)
    refused(lambda: call(it, cumulative_local_expert_recv_stats=more), "has shape (6,); allowed: (4,)")
    refused(lambda: call(it), "l1 weights has shape (4, 256, 256); allowed: (6, 256, 256)")
    assert len(kernel.launches) == 1


def test_each_rank_has_all_of_them(kernel: Cuda, shared: SymmBuffer):  # noqa: F811
    with SymmBuffer(SHAPE, 128, HERE, shared.group) as it:
        own = [part(pair, slice(2, 6)) for pair in ORDERED]  # of the second of two ranks
        mm.mark_transformed(*own)
        kernel.kernel = lambda params: None
        call(it, l1=own[0], l2=own[1], cumulative_local_expert_recv_stats=STATS[:2])
        refused(lambda: call(it, l1=ORDERED[0], l2=ORDERED[1]), "allowed: (4, 256, 256)")
        assert kernel.launches[0].spec.shape == SHAPE
        assert (kernel.launches[0].spec.local_experts, kernel.launches[0].params.rank) == (4, 1)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_shared_experts": 1}, "shared_w13 has shape (2, 256, 256); allowed: (1, 256, 256)"),
        ({"num_shared_experts": 2.0}, "num_shared_experts = 2.0 is not supported; allowed: an integer"),
        ({"num_shared_experts": True}, "num_shared_experts = True is not supported"),
        ({"shared_w2": None}, "one of shared_w13 and shared_w2 is missing; allowed: both or none"),
        ({"shared_w13": SHARED[1]}, "shared_w13 has shape (2, 256, 128); allowed: (2, 256, 256), of the routed ones'"),
        ({"shared_w13": 5}, "shared_w13"),
        ({"shared_w2": (SHARED[1][0], SHARED[1][1].half())}, "shared_w2 scales has dtype torch.float16"),
        ({"shared_w2": (SHARED[1][0], SHARED[1][1][:1])}, "shared_w2 scales has shape (1, 2, 1); allowed: (2, 2, 1)"),
        ({"shared_w13": [ORDERED[0][0][4:], SHARED[0][1]]}, "shared_w13 weights are transformed already"),
        ({"topk": 31}, "shared = 2 is not supported; allowed: 0 to 1, for 32 slots"),
        *(
            ({"shared_weight": bad}, "is not supported; allowed: a number that float32 holds")
            for bad in (math.nan, math.inf, 1e39, "1", None, True)
        ),
    ],
)
def test_what_is_no_layer_is_refused(kernel: Cuda, changed: dict, says: str):
    refused(lambda: layer(**changed), says)
    assert kernel.launches == []


@pytest.mark.parametrize("count", [-1, 6, 10**9])
def test_a_layer_of_shared_experts_alone_is_refused(count: int):
    refused(lambda: whole(num_shared_experts=count), f"num_shared_experts = {count} is not supported; allowed: 0 to 5")


def test_a_weight_without_shared_experts_is_refused():
    refused(
        lambda: mm.MegaMoE(*ROUTED, topk=2, max_tokens=128, shared_weight=0.5), "shared_weight = 0.5", "allowed: 1.0"
    )
    it = mm.MegaMoE(*ROUTED, topk=2, max_tokens=128)
    refused(lambda: call(it.buffer, l1=it.l1, l2=it.l2, shared_weight=2.0), "has no shared experts")
    refused(lambda: call(it.buffer, l1=it.l1, l2=it.l2, shared_weight="1"), "shared_weight = '1' is not supported")


@pytest.mark.parametrize("count", [-1, 31, 2**40, 1.0, "1", None])
def test_how_many_a_buffer_takes(count: Any):
    refused(
        lambda: mm.get_symm_buffer_for_mega_moe(None, 4, 128, 2, 256, 128, count, device=HERE), "shared", "allowed: "
    )
