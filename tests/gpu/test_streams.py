"""One buffer used from several streams: launches must not overlap, whoever issues them."""

from __future__ import annotations

import torch

import megamoe_jit as mm
from megamoe_jit._check.scenarios import get
from tests.gpu.harness import CLAMP, Layer, equal_bits, poisoned


def test_calls_on_two_streams_are_ordered(device: torch.device) -> None:
    """Half-size grids would fit beside each other, and would share the grid barrier and the ticket."""
    scenario = get("L2.heur.midA.t256")
    layer, tokens = Layer(scenario.shape, device), scenario.tokens
    inputs = layer.inputs(tokens)
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    outputs = [poisoned(tokens, layer.shape.hidden, device) for _ in range(40)]
    with layer.buffer(tokens) as buffer:
        inputs.stage(buffer)  # once: calls leave the inputs as they are
        torch.cuda.synchronize()
        for i, y in enumerate(outputs):
            with torch.cuda.stream(streams[i % 2]):
                mm.fp8_mega_moe(y, layer.l1, layer.l2, buffer, activation_clamp=CLAMP, num_sms=60)
        buffer.check()
    verdict = layer.judge(outputs[0], inputs)
    assert verdict.passed, verdict.reason
    assert all(equal_bits(outputs[0], y) for y in outputs[1:])
