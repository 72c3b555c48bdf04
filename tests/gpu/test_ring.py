"""Pools smaller than the batch: rings that make dispatch and the first GEMM wait, and drop nothing."""

from __future__ import annotations

import pytest
import torch

from megamoe_jit._spec import MoEShape
from tests.gpu.harness import VARIANTS, Layer, equal_bits

TOKENS = 4000


@pytest.fixture(scope="module")
def layer(device: torch.device) -> Layer:
    return Layer(MoEShape(1024, 768, 16, 4), device)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("route", ["topk", "single", "powerlaw:1.2"])
@pytest.mark.parametrize("num_sms", [None, 3])
def test_a_small_ring_gives_the_same_bits(layer: Layer, variant: str, route: str, num_sms: int | None) -> None:
    inputs = layer.inputs(TOKENS, route=route)
    outputs = []
    for rows in (4096, 1 << 20):
        with layer.buffer(TOKENS, max_pool_rows=rows) as buffer:
            assert buffer.layout.pool_rows == (4096 if rows == 4096 else buffer.layout.rows)
            for _ in range(3):
                outputs.append(layer.call(buffer, inputs, variant, num_sms=num_sms))
                buffer.check()
    verdict = layer.judge(outputs[0], inputs)
    assert verdict.passed, verdict.reason
    assert all(equal_bits(outputs[0], y) for y in outputs[1:])
