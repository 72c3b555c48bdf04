"""The reference against the MoE modules of transformers, small sizes, on the CPU."""

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")

from megamoe_jit._check.scenarios import make_weights
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import calc_diff, expert_counts, moe_reference, row_diffs
from tests.oracles import MODELS, experts_forward, sample

SHAPE = MoEShape(256, 128, 16, 4)
TOKENS = 48
EXACT = 1e-10  #: FP32 sums in another order
QUANTISED = (1e-4, 5e-4)  #: the e4m3 intermediate: not less, or it was left out; not more, or it is wrong


@pytest.fixture(scope="module")
def weights():
    return make_weights(SHAPE, "cpu", seed=5)


def layer(data, weights, clamp, **more):
    return moe_reference(
        data.x_q, data.x_sf, data.topk_idx, data.topk_weights, weights.l1, weights.l2, activation_clamp=clamp, **more
    )


def exact(data, weights, clamp):
    return layer(data, weights, clamp, requantize=False, out_dtype=torch.float32)


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param]


def test_reference_equals_the_model_layer(model, weights):
    data = sample(model, SHAPE, TOKENS, "cpu", seed=1)
    theirs = experts_forward(model, SHAPE, data, weights)
    ours = exact(data, weights, model.clamp)
    assert calc_diff(ours, theirs) < EXACT
    assert row_diffs(ours, theirs).max() < EXACT


def test_quantisation_error_is_that_of_e4m3(model, weights):
    data = sample(model, SHAPE, TOKENS, "cpu", seed=2)
    theirs = experts_forward(model, SHAPE, data, weights)
    low, high = QUANTISED
    assert low < calc_diff(layer(data, weights, model.clamp), theirs) < high
    assert row_diffs(layer(data, weights, model.clamp), theirs).max() < 2 * high


def test_masked_slots_and_duplicates(model, weights):
    data = sample(model, SHAPE, TOKENS, "cpu", seed=3)
    idx = data.topk_idx.clone()
    idx[::3, 1] = -1
    idx[5] = -1
    idx[7] = idx[7, 0]
    data = dataclasses.replace(data, topk_idx=idx)
    theirs = experts_forward(model, SHAPE, data, weights)
    ours = exact(data, weights, model.clamp)
    assert (ours[5] == 0).all()
    assert row_diffs(ours, theirs).max() < EXACT


def test_routing_is_the_models_own(model):
    data = sample(model, SHAPE, 256, "cpu", seed=4)
    counts = expert_counts(data.topk_idx, SHAPE.experts)
    assert counts.sum() == 256 * SHAPE.topk
    assert counts.max() > 1.3 * counts.float().mean()  # far from uniform
    assert all(len(set(row)) == SHAPE.topk for row in data.topk_idx.tolist())
    factor = {"deepseek_v3": 2.5, "deepseek_v4": 1.5}.get(model.name, 1.0)
    torch.testing.assert_close(data.topk_weights.sum(-1), torch.full((256,), factor))


@pytest.mark.parametrize("clamp", [0.5, 2.0, 10.0])
def test_the_clamp_is_deepseek_v4s(clamp, weights):
    model = MODELS["deepseek_v4"]
    data = sample(model, SHAPE, TOKENS, "cpu", seed=6, scale=20.0)
    theirs = experts_forward(model, SHAPE, data, weights, clamp=clamp)
    assert calc_diff(exact(data, weights, clamp), theirs) < EXACT
    assert calc_diff(exact(data, weights, None), theirs) > 1e-3  # it does bite
