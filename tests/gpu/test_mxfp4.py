"""MXFP4 weights on the GPU: right, the same bits on every run, and what becomes of them on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._check.scenarios import Scenario, get, make_weights
from megamoe_jit._check.verify import WeightCache, judge, run_scenario
from megamoe_jit._spec import FP8_E5M2, MXFP4, MoEShape, Variant
from megamoe_jit.reference import moe_reference
from tests.gpu.harness import Layer, equal_bits

WAYS = ("auto", *(variant.value for variant in Variant.reading(MXFP4)))
#: Of the table, with weights in MXFP4: sizes at their edges, every token count, routes, data and shared experts.
NAMES = (
    *("L1.smoke", "L2.profile_topk8.t16", "L3.h2048_ih512_k4", "L4.mask0.7", "L4.mask_all", "L4.clampinf", "L4.fm0"),
    *("L4.tokens0", "L5.rand007", "threshold.t255", "threshold.t257", "shape.h128_i128_e8_k2"),
    *("shape.h1408_i768_e16_k1", "shape.h2304_i1408_e64_k12", "shape.h1408_i1408_e128_k8", "shape.h768_i2304_e8_k6"),
    *("shape.h128_i256_e1024_k2", "tokens.t1_of_256", "tokens.t131_of_256", "tokens.t3000", "route.hot.t96"),
    *("route.single.t600", "route.duplicate.t96", "route.tile_edges", "mask.half.t600", "data.outliers.t96"),
    *("data.zero_rows.t96", "data.saturating.t600", "data.ladder.t96", "data.nan_row.t96", "padding.t37_of_300"),
    *("shared.k4_s1.t1", "shared.k1_s1.t130", "shared.k8_s24.t300", "shared.mask_all.t96", "prod.flash.t1"),
)
SHAPE = MoEShape(1408, 768, 16, 4)


def scenario(name: str, weights: str) -> Scenario:
    return replace(get(name), weights=weights)


@pytest.mark.parametrize("variant", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_scenarios_with_packed_weights(name: str, variant: str, device: torch.device, weights: WeightCache):
    outcome = run_scenario(scenario(name, MXFP4.name), variant, device, cache=weights)
    assert outcome.passed, outcome.reason
    assert outcome.weights == "mxfp4"


@pytest.fixture(scope="module")
def layer(device: torch.device) -> Layer:
    return Layer(SHAPE, device, weights=MXFP4)


@pytest.mark.parametrize("variant", WAYS)
@pytest.mark.parametrize("tokens", [1, 9, 70, 300, 1500])
def test_the_same_bits_on_every_run(layer: Layer, variant: str, tokens: int):
    inputs = layer.inputs(tokens, route="lognormal")
    with layer.buffer(1536) as buffer:
        first = layer.call(buffer, inputs, variant)
        assert layer.judge(first, inputs).passed
        for _ in range(4):
            assert equal_bits(layer.call(buffer, inputs, variant), first)


def uneven(matrix: tuple[torch.Tensor, ...], gated: bool) -> None:
    """Gives 128 x 128 weights at a time other scales, and their groups exponents by which they stay what they are."""
    _, exponents, scales = matrix
    dice = torch.Generator(device=scales.device).manual_seed(3)
    powers = torch.randint(0, 4, scales.shape, generator=dice, device=scales.device)
    scales *= torch.pow(0.5, powers)
    more = powers.to(torch.uint8).repeat_interleave(128, 1).repeat_interleave(4, 2)
    for each, by in zip(exponents, more, strict=True):
        each.copy_(MXFP4.pack_exponents(MXFP4.unpack_exponents(each, gated) + by, gated))


@pytest.mark.parametrize("variant", WAYS)
def test_scales_that_differ_along_a_row_give_the_same_bits(variant: str, device: torch.device):
    """A tile's k-blocks share a scale as a rule, which is multiplied by when the tile is complete."""
    layer = Layer(SHAPE, device, weights=MXFP4)
    batches = [layer.inputs(tokens) for tokens in (5, 50, 130, 300, 420)]
    with layer.buffer(512) as buffer:
        wanted = [layer.call(buffer, inputs, variant) for inputs in batches]
        uneven(layer.l1, True)
        uneven(layer.l2, False)
        for inputs, y in zip(batches, wanted, strict=True):
            assert layer.judge(y, inputs).passed
            assert equal_bits(layer.call(buffer, inputs, variant), y)


def test_both_formats_take_turns_in_one_buffer(layer: Layer, device: torch.device):
    """A buffer serves weights of any format: each call takes it from what it is given."""
    inputs = layer.inputs(130)
    in_fp8 = [mm.fp8_from_mxfp4(*given) for given in (layer.weights.l1, layer.weights.l2)]
    l1, l2 = mm.transform_weights_for_mega_moe_sm90(*in_fp8)
    with layer.buffer(256) as buffer:
        y = layer.call(buffer, inputs)
        other = torch.empty_like(y)
        inputs.stage(buffer)
        mm.fp8_mega_moe(other, l1, l2, buffer, activation_clamp=10.0)
        assert layer.judge(other, inputs).passed, "the values are the same"
        assert equal_bits(layer.call(buffer, inputs), y)


def test_a_layer_in_a_graph_reads_loaded_weights(layer: Layer, device: torch.device):
    other = make_weights(SHAPE, device, 1, MXFP4)
    inputs = layer.inputs(33)
    it = mm.MegaMoE(layer.weights.l1, layer.weights.l2, topk=SHAPE.topk, max_tokens=128, clamp=10.0)
    batch = inputs.x, inputs.topk_idx, inputs.topk_weights
    assert layer.judge(it(*batch), inputs).passed
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = it(*batch)
    it.load_weights(other.l1, other.l2)
    graph.replay()
    given = inputs.x_q, inputs.x_sf, inputs.topk_idx, inputs.topk_weights
    assert judge(y, moe_reference(*given, other.l1, other.l2, activation_clamp=10.0)).passed
    it.check()
    it.destroy()


@pytest.mark.parametrize("name", ["mxfp4.h1408_i768.t64", "mxfp4.h768_i2304.t130"])
def test_the_transform_gives_the_bits_of_the_host(name: str, device: torch.device):
    shape = get(name).shape
    here = make_weights(shape, device, 0, MXFP4)
    there = [tuple(each.cpu() for each in given) for given in (here.l1, here.l2)]
    made, wanted = (mm.transform_weights_for_mega_moe_sm90(*given) for given in ((here.l1, here.l2), there))
    for a, b in zip((*made[0], *made[1]), (*wanted[0], *wanted[1]), strict=True):
        assert equal_bits(a.cpu(), b)
    back = mm.inverse_transform_weights_for_mega_moe_sm90(*made)
    for a, b in zip((*back[0], *back[1]), (*here.l1, *here.l2), strict=True):
        assert equal_bits(a, b)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        a, b = (mm.fp8_from_mxfp4(*given, dtype=dtype) for given in (here.l1, there[0]))
        assert equal_bits(a[0].cpu(), b[0])
        assert equal_bits(a[1].cpu(), b[1])


@pytest.mark.skipif(not Variant.reading(FP8_E5M2), reason="no variant multiplies e5m2 codes of eight bits")
@pytest.mark.parametrize("variant", [variant.value for variant in Variant.reading(FP8_E5M2)])
def test_eight_bits_of_e5m2(variant: str, device: torch.device, weights: WeightCache):
    for name in ("L1.smoke", "shape.h1408_i768_e16_k1", "tokens.t3000"):
        outcome = run_scenario(scenario(name, FP8_E5M2.name), variant, device, cache=weights)
        assert outcome.passed, outcome.reason
