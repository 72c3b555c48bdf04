"""Pools smaller than the batch: rings that make dispatch and the first GEMM wait, and drop nothing."""

from __future__ import annotations

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._scenarios import Scenario, make_inputs
from megamoe_jit._spec import MoEShape
from megamoe_jit._verify import WeightCache, judge
from megamoe_jit.reference import moe_reference

SHAPE = MoEShape(1024, 768, 16, 4)


@pytest.mark.parametrize("variant", ["pingpong", "cooperative"])
@pytest.mark.parametrize("route", ["topk", "single", "powerlaw:1.2"])
@pytest.mark.parametrize("num_sms", [None, 3])
def test_a_small_ring_gives_the_same_bits(
    device: torch.device, weights: WeightCache, variant: str, route: str, num_sms: int | None
) -> None:
    tokens = 4000
    scenario = Scenario("ring", SHAPE, tokens, tokens, route=route)
    entry = weights.get(SHAPE, device, 0, mm)
    inputs = make_inputs(scenario, device, 0, entry.weights)
    outputs = []
    for rows in (4096, 1 << 20):
        buffer = mm.get_symm_buffer_for_mega_moe(
            None, SHAPE.experts, tokens, SHAPE.topk, SHAPE.hidden, SHAPE.intermediate, device=device, max_pool_rows=rows
        )
        assert buffer.layout.pool_rows == (4096 if rows == 4096 else buffer.layout.rows)
        buffer.x[:tokens].copy_(inputs.x_q)
        buffer.x_sf[:tokens].copy_(inputs.x_sf)
        buffer.topk_idx[:tokens].copy_(inputs.topk_idx)
        buffer.topk_weights[:tokens].copy_(inputs.topk_weights)
        for _ in range(3):
            y = torch.full((tokens, SHAPE.hidden), float("nan"), dtype=torch.bfloat16, device=device)
            mm.fp8_mega_moe(
                y, entry.l1, entry.l2, buffer, activation_clamp=scenario.clamp, variant=variant, num_sms=num_sms
            )
            buffer.check()
            outputs.append(y)
        buffer.destroy()
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
