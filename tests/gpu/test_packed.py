"""MXFP4 weights with every variant: sizes that fill no tile, and experts with any number of rows."""

from __future__ import annotations

import math

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._check.verify import judge
from megamoe_jit._layer.quantize import quantize_activations
from megamoe_jit._spec import MXFP4, MoEShape, Variant
from megamoe_jit.reference import expert_counts, moe_reference
from tests.gpu.harness import CLAMP, equal_bits, poisoned

#: Half tiles of columns, one and two k-blocks, more experts than blocks of a tile have warps, two stages in `unpack`.
SHAPES = (
    MoEShape(512, 256, 4, 2),
    MoEShape(1408, 768, 8, 4),
    MoEShape(512, 2304, 6, 3),
    MoEShape(128, 128, 1, 1),
    MoEShape(640, 384, 736, 1),
)
TOKENS = (1, 2, 8, 9, 17, 33, 65, 130, 300)


def matrix(experts: int, rows: int, depth: int, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP4 codes and e8m0 exponents that spread as far as stays exact."""
    device = gen.device
    codes = torch.randint(0, 256, (experts, rows, depth // 2), dtype=torch.uint8, device=device, generator=gen)
    spread = torch.randint(-20, 1, (experts, rows, depth // 32), device=device, generator=gen)
    blocks = torch.randint(119, 123, (experts, rows // 128, 1, depth // 128, 1), device=device, generator=gen)
    exponents = spread.view(experts, rows // 128, 128, depth // 128, 4) + blocks
    return codes, exponents.reshape(spread.shape).to(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("variant", [variant.value for variant in Variant.reading(MXFP4)])
def test_packed_weights_give_what_the_reference_says(
    shape: MoEShape, hot: bool, variant: str, device: torch.device
) -> None:
    gen = torch.Generator(device).manual_seed(shape.hidden)
    plain = (
        matrix(shape.experts, 2 * shape.intermediate, shape.hidden, gen),
        matrix(shape.experts, shape.hidden, shape.intermediate, gen),
    )
    l1, l2 = mm.transform_weights_for_mega_moe_sm90(*plain)
    sizes = (shape.experts, max(TOKENS), shape.topk, shape.hidden, shape.intermediate)
    with mm.get_symm_buffer_for_mega_moe(None, *sizes, device=device) as buffer:
        for tokens in TOKENS:
            x = torch.randn(tokens, shape.hidden, device=device, generator=gen).to(torch.bfloat16)
            scores = torch.randn(tokens, shape.experts, device=device, generator=gen)
            scores[:, 0] += 9 * hot
            weights, ids = scores.softmax(-1).topk(shape.topk, -1)
            ids[tokens // 2, -1] = -1
            inputs = (*quantize_activations(x), ids, weights)
            outputs = []
            for _ in range(2):
                for to, given in zip(
                    (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights), inputs, strict=True
                ):
                    to[:tokens].copy_(given)
                y, stats = poisoned(tokens, shape.hidden, device), torch.zeros_like(expert_counts(ids, shape.experts))
                mm.fp8_mega_moe(y, l1, l2, buffer, stats, activation_clamp=CLAMP, variant=variant)
                buffer.check()
                assert torch.equal(stats, expert_counts(ids, shape.experts))
                outputs.append(y)
            verdict = judge(outputs[0], moe_reference(*inputs, *plain, activation_clamp=CLAMP))
            assert verdict.passed, f"{tokens} tokens: {verdict.reason}"
            assert not math.isnan(float(outputs[0].sum()))
            assert equal_bits(*outputs)
