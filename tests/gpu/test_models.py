"""The kernel against the MoE modules of transformers at the models' real hidden and intermediate sizes."""

import pytest
import torch

from megamoe_jit._check.scenarios import Inputs
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import calc_diff, expert_counts, row_diffs
from tests.gpu.harness import VARIANTS, Layer

pytest.importorskip("transformers")

from tests.oracles import MODELS, experts_forward, sample

SHAPES = {
    "deepseek_v3": MoEShape(7168, 2048, 32, 8),
    "deepseek_v4": MoEShape(4096, 2048, 32, 6),
    "qwen3_moe": MoEShape(2048, 768, 32, 8),
    "mimo_v2_flash": MoEShape(4096, 2048, 32, 8),
}
MAX_DIFF = 5e-4  #: the e4m3 intermediate costs about 2.6e-4, the rest is rounding
MAX_ROW_DIFF = 1e-3


def test_every_model_has_a_shape():
    assert set(SHAPES) == set(MODELS)


@pytest.fixture(scope="module", params=list(SHAPES))
def case(request, device):
    """Model, layer, inputs routed by the model, and the output of its experts."""
    model, shape = MODELS[request.param], SHAPES[request.param]
    layer = Layer(shape, device, seed=11)
    data = sample(model, shape, 200, device, seed=12)
    theirs = experts_forward(model, shape, data, layer.weights)
    inputs = Inputs(
        x=data.x_q.bfloat16(),
        x_q=data.x_q,
        x_sf=data.x_sf,
        topk_idx=data.topk_idx,
        topk_weights=data.topk_weights,
        l1=layer.weights.l1,
        l2=layer.weights.l2,
    )
    yield model, layer, inputs, theirs
    torch.cuda.empty_cache()


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernel_equals_the_model_layer(case, variant, device):
    model, layer, inputs, theirs = case
    stats = torch.zeros(layer.shape.experts, dtype=torch.int32, device=device)
    with layer.buffer(200) as buffer:
        y = layer.call(buffer, inputs, variant, stats, activation_clamp=model.clamp)
    assert calc_diff(y, theirs) < MAX_DIFF
    assert row_diffs(y, theirs).max() < MAX_ROW_DIFF
    assert torch.equal(stats, expert_counts(inputs.topk_idx, layer.shape.experts))
    verdict = layer.judge(y, inputs, model.clamp)
    assert verdict.passed, verdict.reason
