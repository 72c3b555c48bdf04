"""One buffer used from several streams: launches must not overlap, whoever issues them."""

from __future__ import annotations

import torch

import megamoe_jit as mm
from megamoe_jit._scenarios import get, make_inputs
from megamoe_jit._verify import WeightCache, judge
from megamoe_jit.reference import moe_reference


def test_calls_on_two_streams_are_ordered(device: torch.device, weights: WeightCache) -> None:
    """Half-size grids would fit beside each other, and would share the grid barrier and the ticket."""
    scenario = get("L2.heur.midA.t256")
    entry = weights.get(scenario.shape, device, 0, mm)
    inputs = make_inputs(scenario, device, 0, entry.weights)
    shape, tokens = scenario.shape, scenario.tokens
    buffer = mm.get_symm_buffer_for_mega_moe(
        None, shape.experts, tokens, shape.topk, shape.hidden, shape.intermediate, device=device
    )
    buffer.x[:tokens].copy_(inputs.x_q)
    buffer.x_sf[:tokens].copy_(inputs.x_sf)
    buffer.topk_idx[:tokens].copy_(inputs.topk_idx)
    buffer.topk_weights[:tokens].copy_(inputs.topk_weights)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    outputs = [torch.full((tokens, shape.hidden), float("nan"), dtype=torch.bfloat16, device=device) for _ in range(40)]
    torch.cuda.synchronize()
    for i, y in enumerate(outputs):
        with torch.cuda.stream(streams[i % 2]):
            mm.fp8_mega_moe(y, entry.l1, entry.l2, buffer, activation_clamp=scenario.clamp, num_sms=60)
    buffer.check()
    expected = moe_reference(
        inputs.x_q,
        inputs.x_sf,
        inputs.topk_idx,
        inputs.topk_weights,
        inputs.l1,
        inputs.l2,
        activation_clamp=scenario.clamp,
    )
    verdict = judge(outputs[0], expected)
    assert verdict.passed, verdict.reason
    assert all(torch.equal(outputs[0], y) for y in outputs[1:])
    buffer.destroy()
