"""The backend in FlashInfer's own mega layer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.quantize import quantize_activations
from megamoe_jit._layer.weights import transform_weights_for_mega_moe_sm90
from megamoe_jit._spec import MoEShape
from megamoe_jit.engines.flashinfer import KERNEL_NAME, MegaMoeConfig, seams
from megamoe_jit.engines.seams import misfits
from tests.engines.flashinfer_world import flashinfer_world
from tests.engines.standins import batch, expected, experts, packed_experts

SHAPE = MoEShape(256, 128, 4, 2)
RELEASES = ("flashinfer-python", seams.TESTED)


@pytest.fixture
def world(release, buffers):
    with flashinfer_world(release, SimpleNamespace(size=lambda: 1)) as made:
        yield made


def test_everything_that_is_relied_upon_is_there(release):
    assert misfits(seams.SEAMS, release / "flashinfer") == []


def test_the_layer_equals_the_reference(world, buffers):
    l1, l2 = experts(SHAPE)
    made = world.layer(SHAPE, l1, l2, 1.0)
    for tokens in (1, 7, 0):
        of = batch(tokens, SHAPE)
        assert torch.equal(made(world.tensors(of)), expected(of, l1, l2, 1.0))
    assert (buffers[0].prepared, len(buffers)) == (1, 1)


def test_weights_that_it_quantises(world):
    l1, l2 = experts(SHAPE)
    values = torch.randn(4, 256, 256), torch.randn(4, 256, 128)
    made = world.layer(SHAPE, (values[0], None), (values[1], None), 1.0)
    assert made(world.tensors(batch(3, SHAPE))).shape == (3, 256)


def test_weights_in_mxfp4_have_kernels_of_their_own(world, buffers):
    l1, l2 = packed_experts(SHAPE)
    made = world.layer(SHAPE, l1, l2, 1.0)
    of = batch(7, SHAPE)
    assert torch.equal(made(world.tensors(of)), expected(of, l1, l2, 1.0))
    world.layer(SHAPE, *experts(SHAPE), 1.0)(world.tensors(of))
    assert [each.formats for each in buffers] == [["mxfp4"], ["fp8"]]


@pytest.mark.parametrize("draw", [experts, packed_experts])
def test_weights_in_the_kernels_order(world, buffers, draw):
    l1, l2 = draw(SHAPE)
    ordered = transform_weights_for_mega_moe_sm90(l1, l2)
    made = world.layer(SHAPE, l1, l2, 1.0, preprocess_weights=False, transformed_weights=ordered)
    of = batch(7, SHAPE)
    assert torch.equal(made(world.tensors(of)), expected(of, l1, l2, 1.0))
    assert buffers[0].formats == ["mxfp4" if draw is packed_experts else "fp8"]
    with pytest.raises(ConfigError, match="tensors given|not in the kernel's order"):
        world.layer(SHAPE, l1, l2, 1.0, preprocess_weights=False, transformed_weights=(l1, l2))


def test_buckets_of_tokens_are_all_the_same_kernels(world):
    """What an engine names that captures graphs of several sizes."""
    l1, l2 = experts(SHAPE)
    made = world.layer(SHAPE, l1, l2, 1.0)
    of = batch(5, SHAPE)
    made.stage_inputs(world.tensors(of), compile_tokens_per_rank=8)
    assert torch.equal(made.compute_staged(output=None), expected(of, l1, l2, 1.0))


def test_activations_in_fp8_and_an_output_of_the_callers(world):
    l1, l2 = experts(SHAPE)
    made = world.layer(SHAPE, l1, l2, 1.0, quantize_input=False)
    of = batch(5, SHAPE)
    codes, scales = quantize_activations(of.x)
    place = torch.full((8, 256), 7.0, dtype=torch.bfloat16)
    given = world.module("tensors").MoEEpTensors(codes, of.ids, of.weights, scales=scales, output=place)
    made(given)
    assert torch.equal(place[:5], expected(of, l1, l2, 1.0))
    assert (place[5:] == 7).all()


def test_a_workspace_outlasts_the_sleep_of_an_engine(world, buffers, monkeypatch):
    """Its memory is made where that of all engines' buffers is, outside of pools that they give up."""
    made_there = []

    def made_apart(make):
        assert buffers == []
        made_there.append(make())
        return made_there[0]

    monkeypatch.setattr("megamoe_jit.engines.flashinfer.backend.made_apart", made_apart)
    world.layer(SHAPE, *experts(SHAPE), 1.0)(world.tensors(batch(3, SHAPE)))
    assert made_there == buffers


def test_layers_share_a_workspace_until_the_last_is_destroyed(world, buffers):
    first, second = (world.layer(SHAPE, *experts(SHAPE, seed), 1.0) for seed in (0, 1))
    for each in (first, second):
        each(world.tensors(batch(3, SHAPE)))
    assert len(buffers) == 1
    first.destroy()
    assert not buffers[0].destroyed
    second.destroy()
    assert buffers[0].destroyed


def test_experts_that_ranks_cannot_share_evenly_are_refused(world):
    bootstrap, fleet = SimpleNamespace(world_size=3), SimpleNamespace(num_experts=4, token_hidden_size=256)
    kernel = world.module("core.kernel.registry").create_mega_kernel(MegaMoeConfig(128, 2))
    assert kernel.kernel_name() == KERNEL_NAME
    with pytest.raises(ConfigError, match="as many on each of the 3 ranks"):
        kernel.validate_init(bootstrap, fleet)
