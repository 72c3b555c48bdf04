"""The halves of this GPU's L2, and that results do not depend on them."""

from __future__ import annotations

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._check.scenarios import Scenario, make_inputs
from megamoe_jit._device import l2_partition as _l2
from megamoe_jit._device.l2_partition import MOST_SMS, sides_of_sms, split
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import MoEShape

SHAPE = MoEShape(hidden=512, intermediate=640, experts=8, topk=3)  # 5 and 2 columns: the side that begins changes
SIZES = (SHAPE.topk, SHAPE.hidden, SHAPE.intermediate)


def test_this_gpu_has_two_halves(device: torch.device):
    """Seen on every H100 and H200 so far; the measurement is repeatable."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    found = [sides_of_sms(device), *(split(_l2._latencies(device, sms)) for _ in range(4))]
    assert found[0] is not None
    first = {sm for sm in range(MOST_SMS) if found[0][sm // 32] >> sm % 32 & 1}
    assert len(first) == sms // 2
    for again in found[1:]:
        assert again is not None
        other = {sm for sm in range(MOST_SMS) if again[sm // 32] >> sm % 32 & 1}
        assert len(first ^ other) <= 8, "but for SMs that were moved to even the sides out"


@pytest.mark.parametrize("variant", ["pingpong", "cooperative"])
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_same_bits_with_and_without_sides(device: torch.device, variant: str, tokens: int):
    inputs = make_inputs(Scenario("sides", SHAPE, tokens, tokens), device)
    l1, l2 = mm.transform_weights_for_mega_moe_sm90(inputs.l1, inputs.l2)
    results = []
    for sides in (True, False, True):
        with override(l2_sides=sides):
            buffer = mm.get_symm_buffer_for_mega_moe(None, SHAPE.experts, tokens, *SIZES)
            assert buffer.plan(tokens, variant, True, None).two_sides is sides
        y = torch.full((tokens, SHAPE.hidden), torch.nan, dtype=torch.bfloat16, device=device)
        with override(l2_sides=sides):
            inputs.stage(buffer)
            mm.fp8_mega_moe(y, l1, l2, buffer, variant=variant)
        buffer.check()
        buffer.destroy()
        results.append(y)
    assert torch.isfinite(results[0]).all()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
