"""Pools smaller than the batch: rings that make dispatch and the first GEMM wait, and drop nothing."""

from __future__ import annotations

import pytest
import torch

from megamoe_jit._spec import FP8, MXFP4, MoEShape, Variant
from tests.gpu.harness import Layer, equal_bits

TOKENS = 4000
WAYS = [(weights.name, variant.value) for weights in (FP8, MXFP4) for variant in Variant.reading(weights)]


@pytest.fixture(scope="module")
def layers(device: torch.device) -> dict[str, Layer]:
    return {weights.name: Layer(MoEShape(1024, 768, 16, 4), device, weights=weights) for weights in (FP8, MXFP4)}


@pytest.mark.parametrize(("weights", "variant"), WAYS)
@pytest.mark.parametrize("route", ["topk", "single", "powerlaw:1.2"])
@pytest.mark.parametrize("num_sms", [None, 3])
def test_a_small_ring_gives_the_same_bits(
    layers: dict[str, Layer], weights: str, variant: str, route: str, num_sms: int | None
) -> None:
    small_ring_gives_the_same_bits(layers[weights], TOKENS, route, variant, num_sms)


@pytest.mark.parametrize("variant", [variant.value for variant in Variant.reading(MXFP4)])
def test_a_small_ring_of_experts_with_a_tile_or_two_each(device: torch.device, variant: str) -> None:
    """70 rows as a rule, so a lap is 32 experts: in `wide` most have one tile of up to 80 rows, some two of 64."""
    layer = Layer(MoEShape(512, 256, 256, 4), device, weights=MXFP4)
    small_ring_gives_the_same_bits(layer, 4500, "topk", variant, None)


def small_ring_gives_the_same_bits(layer: Layer, tokens: int, route: str, variant: str, num_sms: int | None) -> None:
    inputs = layer.inputs(tokens, route=route)
    outputs = []
    for rows in (4096, 1 << 20):
        with layer.buffer(tokens, max_pool_rows=rows) as buffer:
            assert buffer.layout.pool_rows == (4096 if rows == 4096 else buffer.layout.rows)
            for _ in range(3):
                outputs.append(layer.call(buffer, inputs, variant, num_sms=num_sms))
                buffer.check()
    verdict = layer.judge(outputs[0], inputs)
    assert verdict.passed, verdict.reason
    assert all(equal_bits(outputs[0], y) for y in outputs[1:])
