"""`MegaMoE`, the layer object, and weights that are permuted while the kernel reads them."""

from __future__ import annotations

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._check.verify import judge
from megamoe_jit._layer.quantize import quantize_activations, quantize_weights
from megamoe_jit.reference import moe_reference

EXPERTS, TOPK, HIDDEN, INTERMEDIATE, TOKENS = 16, 4, 1024, 768, 200


@pytest.fixture(scope="module")
def case(device: torch.device) -> dict[str, torch.Tensor]:
    gen = torch.Generator(device=device).manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, device=device)

    scores = normal(TOKENS, EXPERTS)
    weights, ids = scores.softmax(dim=-1).topk(TOPK, dim=-1)
    return {
        "w13": (normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN) * 0.05).to(torch.bfloat16),
        "w2": (normal(EXPERTS, HIDDEN, INTERMEDIATE) * 0.05).to(torch.bfloat16),
        "x": normal(TOKENS, HIDDEN).to(torch.bfloat16),
        "ids": ids,
        "weights": weights,
    }


def expected(case: dict[str, torch.Tensor], clamp: float | None) -> torch.Tensor:
    codes, scales = quantize_activations(case["x"])
    l1, l2 = quantize_weights(case["w13"]), quantize_weights(case["w2"])
    return moe_reference(codes, scales, case["ids"], case["weights"], l1, l2, activation_clamp=clamp)


@pytest.mark.parametrize("clamp", [None, 10.0])
def test_layer_from_bf16_weights(case: dict[str, torch.Tensor], clamp: float | None) -> None:
    layer = mm.MegaMoE(case["w13"], case["w2"], topk=TOPK, max_tokens=TOKENS, clamp=clamp)
    for count in (TOKENS, 3, 0, TOKENS):
        y = layer(case["x"][:count], case["ids"][:count], case["weights"][:count])
        layer.check()
        assert y.shape == (count, HIDDEN)
        verdict = judge(y, expected(case, clamp)[:count])
        assert verdict.passed, verdict.reason
    layer.destroy()


def test_layer_takes_quantised_weights_in_place(case: dict[str, torch.Tensor]) -> None:
    l1, l2 = quantize_weights(case["w13"]), quantize_weights(case["w2"])
    layer = mm.MegaMoE(l1, l2, topk=TOPK, max_tokens=TOKENS, inplace=True)
    assert layer.l1[0].data_ptr() == l1[0].data_ptr()
    y = layer(case["x"], case["ids"], case["weights"])
    layer.check()
    verdict = judge(y, expected(case, None))
    assert verdict.passed, verdict.reason
    layer.destroy()


def test_too_many_tokens_are_refused_by_staging_and_served_by_a_call(case: dict[str, torch.Tensor]) -> None:
    layer = mm.MegaMoE(case["w13"], case["w2"], topk=TOPK, max_tokens=128)
    with pytest.raises(mm.ConfigError, match="200 tokens"):
        layer.stage(case["x"], case["ids"], case["weights"])
    verdict = judge(layer(case["x"], case["ids"], case["weights"]), expected(case, None))
    assert verdict.passed, verdict.reason
    layer.destroy()


def test_experts_permuted_in_place_between_calls(case: dict[str, torch.Tensor]) -> None:
    """Expert rebalancing: the kernel's own tensors are permuted, and the ids follow."""
    layer = mm.MegaMoE(case["w13"], case["w2"], topk=TOPK, max_tokens=TOKENS)
    before = layer(case["x"], case["ids"], case["weights"])
    order = torch.randperm(EXPERTS, device=case["x"].device, generator=torch.Generator(case["x"].device).manual_seed(3))
    for tensor in (*layer.l1, *layer.l2):
        raw = tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor
        raw.copy_(raw[order].clone())
    new_place = torch.empty_like(order)
    new_place[order] = torch.arange(EXPERTS, device=order.device)
    after = layer(case["x"], new_place[case["ids"]], case["weights"])
    layer.check()
    assert torch.equal(before, after)
    layer.destroy()
