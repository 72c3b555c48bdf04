"""Layers from the inputs that a model has: staged as `quantize_activations` does it, in the launch or before it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._check.scenarios import SCENARIOS, Scenario, make_inputs
from megamoe_jit._check.verify import WeightCache
from megamoe_jit._layer.from_bf16 import mega_moe_from_bf16
from tests.gpu.harness import CLAMP, VARIANTS, Layer, equal_bits

SHAPE = mm.MoEShape(1024, 512, 16, 4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ODD = (0.0, -0.0, 1e-40, 6e-5, 1e-10, 3e38, -3e38, math.inf, -math.inf, math.nan, 448.0)
FAMILIES = ("tokens", "route", "mask", "data", "padding", "shared")


@pytest.fixture(scope="module")
def layer(device: torch.device) -> Layer:
    return Layer(SHAPE, device)


@pytest.fixture
def buffer(layer: Layer) -> Iterator[mm.SymmBuffer]:
    with layer.buffer(320) as it:
        yield it


def poison(it: mm.SymmBuffer) -> None:
    """What a call must not read: NaN, and ids of experts."""
    it.x.view(torch.uint8).fill_(0x7F), it.x_sf.fill_(math.nan), it.topk_idx.fill_(1), it.topk_weights.fill_(math.nan)


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def hostile(rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal rows, rows of all sizes, rows with odd numbers in them, rows of random bits."""
    gen = torch.Generator(device=device).manual_seed(rows * hidden)
    x = torch.randn(rows, hidden, device=device, generator=gen)
    x[1::4] *= 10.0 ** (torch.rand(x[1::4].shape, device=device, generator=gen) * 60 - 35)
    pick = torch.randint(0, len(ODD) * 30, x[2::4].shape, device=device, generator=gen)
    odd = torch.tensor(ODD, device=device)[pick.clamp(max=len(ODD) - 1)]
    x[2::4] = torch.where(pick < len(ODD), odd, x[2::4])
    made = x.to(dtype)
    bits = torch.randint(0, 256, (*made[3::4].shape[:1], hidden * dtype.itemsize), device=device, generator=gen)
    made[3::4] = bits.to(torch.uint8).view(dtype)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [0, 3, 8])
def test_the_kernel_stages_as_quantize_activations_does(device: torch.device, dtype: torch.dtype, gap: int):
    for hidden, tokens in ((128, 1), (128, 77), (1024, 64), (7168, 300), (384, 1000)):
        x = hostile(tokens, hidden + gap, dtype, device)[:, :hidden]
        ids = torch.randint(-1, 16, (tokens, 5), device=device).int()[:, :4]
        weights = torch.randn(tokens, 4, device=device).to(DTYPES[gap % 3])
        outputs = (
            torch.full((tokens + 9, hidden), 0x55, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn),
            torch.full((tokens + 9, hidden // 128), 7.0, device=device),
            torch.full((tokens + 9, 4), 99, dtype=torch.int64, device=device),
            torch.full((tokens + 9, 4), 5.0, device=device),
        )
        mm.mega_moe_pre_dispatch_sm90(x, ids, weights, *outputs, tokens, routed_scaling_factor=2.5)
        codes, scales = mm.quantize_activations(x)
        assert equal_bits(outputs[0][:tokens], codes)
        assert same_numbers(outputs[1][:tokens], scales)
        assert torch.equal(outputs[2][:tokens], ids.long())
        assert torch.equal(outputs[3][:tokens], weights.float() * 2.5)
        assert (outputs[0][tokens:].view(torch.uint8) == 0x55).all()
        assert (outputs[1][tokens:] == 7).all()
        assert (outputs[2][tokens:] == -1).all()
        assert (outputs[3][tokens:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantisers_give_the_same_bits_on_a_gpu_and_on_a_cpu(device: torch.device, dtype: torch.dtype):
    x = hostile(256, 512, dtype, device)
    for quantise in (mm.quantize_activations, mm.quantize_weights):
        here, there = quantise(x), quantise(x.cpu())
        a, b = here[0].cpu().view(torch.uint8), there[0].view(torch.uint8)
        assert ((a == b) | ((a & b & 0x7F) == 0x7F)).all(), "a NaN has no sign on a GPU"
        assert same_numbers(here[1].cpu(), there[1])


@pytest.mark.parametrize("name", ["row", "column", "exponents", "packed", "packed columns"])
def test_codes_that_come_with_scales_are_copied(device: torch.device, name: str):
    hidden, tokens = 1024, 33
    codes, scales = mm.quantize_activations(torch.randn(tokens, hidden, device=device))
    exponents = torch.randint(0, 256, (tokens, hidden // 128), dtype=torch.uint8, device=device)
    e8m0, words = exponents.view(torch.float8_e8m0fnu), exponents.view(torch.int32)
    given, wanted = {
        "row": (scales, scales),
        "column": (scales.t().contiguous().t(), scales),
        "exponents": (e8m0, e8m0.float()),
        "packed": (words, e8m0.float()),
        "packed columns": (words.t().contiguous().t(), e8m0.float()),
    }[name]
    with mm.get_symm_buffer_for_mega_moe(None, 8, tokens, 2, hidden, 128, device=device) as it:
        ids, weights = torch.zeros(tokens, 2, dtype=torch.int64, device=device), torch.ones(tokens, 2, device=device)
        assert mm.stage(it, codes, ids, weights, x_scales=given, padded_tokens=40) == 40
        assert equal_bits(it.x[:tokens], codes)
        assert same_numbers(it.x_sf[:tokens], wanted)
        assert (it.topk_idx[tokens:40] == -1).all()


@pytest.mark.parametrize(
    "scenario", [s for s in SCENARIOS if s.family in FAMILIES and not s.slow], ids=lambda s: s.name
)
def test_scenarios_from_bf16(device: torch.device, weights: WeightCache, scenario: Scenario):
    """In one launch and in two the same bits as from a staged buffer, which other tests hold against the reference."""
    drawn = weights.get(scenario, device, 0, mm)
    inputs = make_inputs(scenario, device, weights=drawn.weights)
    s = scenario.shape
    with mm.get_symm_buffer_for_mega_moe(
        None, s.experts, scenario.capacity, s.topk, s.hidden, s.intermediate, s.shared, device=device
    ) as it:
        for variant in VARIANTS:
            options = {**scenario.options, "variant": variant}
            wanted = torch.empty(scenario.tokens, s.hidden, dtype=torch.bfloat16, device=device)
            inputs.stage(it)
            mm.fp8_mega_moe(wanted, drawn.l1, drawn.l2, it, **options)
            for x, ids in ((inputs.x, inputs.topk_idx.int()), (inputs.x.float(), inputs.topk_idx)):
                poison(it)
                y = mega_moe_from_bf16(x, ids, inputs.topk_weights, drawn.l1, drawn.l2, it, **options)
                it.check()
                assert equal_bits(y, wanted)


def test_graphs_of_one_and_of_two_launches(layer: Layer, buffer: mm.SymmBuffer):
    buffer.prepare_all()
    inputs, other = (layer.inputs(100, seed) for seed in (0, 1))
    for x in (inputs.x.clone(), inputs.x.float()):
        ids, weights = inputs.topk_idx.clone(), inputs.topk_weights.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mega_moe_from_bf16(x, ids, weights, layer.l1, layer.l2, buffer, activation_clamp=CLAMP)
        for each in (inputs, other):
            x.copy_(each.x), ids.copy_(each.topk_idx), weights.copy_(each.topk_weights)
            graph.replay()
            assert equal_bits(y, layer.call(buffer, each))


def test_calls_on_two_streams_do_not_change_each_others_inputs(layer: Layer, buffer: mm.SymmBuffer):
    batches = [layer.inputs(320, seed) for seed in range(2)]
    wanted = [layer.call(buffer, each) for each in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for turn in range(20):
        found = []
        for each, stream in zip(batches, streams, strict=True):
            with torch.cuda.stream(stream):
                x = each.x if turn % 2 else each.x.float()
                found.append(
                    mega_moe_from_bf16(
                        x, each.topk_idx, each.topk_weights, layer.l1, layer.l2, buffer, activation_clamp=CLAMP
                    )
                )
        torch.cuda.synchronize()
        assert all(equal_bits(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_sealed_process_stages_with_what_was_warmed_up(layer: Layer, buffer: mm.SymmBuffer):
    assert all(result.ok for result in mm.warmup(mm.enumerate_specs(SHAPE)))
    inputs = layer.inputs(7)
    mm.seal()
    try:
        for x in (inputs.x, inputs.x.half(), inputs.x.float()):
            mega_moe_from_bf16(x, inputs.topk_idx, inputs.topk_weights, layer.l1, layer.l2, buffer)
        buffer.check()
    finally:
        mm.unseal()
