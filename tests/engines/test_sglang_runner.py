"""`--moe-runner-backend megamoe_jit` in SGLang's own sources: experts under tensor or expert parallelism."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import FP8, MoEShape
from megamoe_jit.engines.sglang.runner import _READY
from tests.engines.sglang_world import sglang_world
from tests.engines.standins import batch, expected, experts
from tests.engines.test_sglang import RELEASES, SHAPE, from_disk, loaded, loaded_packed

__all__ = ["RELEASES"]


@pytest.fixture
def world(release, buffers):
    with sglang_world(release) as made:
        made.start(runner="megamoe_jit")
        yield made


def forward(world, layer, of):
    output = world.module("layers.moe.topk").StandardTopKOutput(of.weights, of.ids, None)
    dispatched = layer.dispatcher.dispatch(of.x, output)
    return layer.dispatcher.combine(layer.run_moe_core(dispatched))


@pytest.mark.parametrize(("limit", "factor"), [(None, None), (0.7, 2.5)])
def test_one_rank(world, limit, factor):
    layer, l1, l2 = loaded(world, swiglu_limit=limit, routed_scaling_factor=factor)
    of = batch(5, SHAPE)
    assert torch.equal(forward(world, layer, of), expected(of, l1, l2, limit, factor or 1.0))


@pytest.mark.parametrize("rank", [0, 1])
def test_expert_parallel(world, rank):
    world.parallel.moe_ep_size, world.parallel.moe_ep_rank = 2, rank
    layer, l1, l2 = loaded(world)
    of = batch(9, MoEShape(256, 128, 8, 2))
    of.ids.clamp_(min=0)  # 0.5.22 takes -1 for the last expert; where it pads, nobody reads the result
    found = forward(world, layer, of)
    local = torch.where((of.ids >= 4 * rank) & (of.ids < 4 * rank + 4), of.ids - 4 * rank, -1)
    of.ids = local
    assert torch.equal(found, expected(of, l1, l2))


def test_tensor_parallel(world):
    world.parallel.moe_tp_size, world.parallel.moe_tp_rank = 2, 1
    layer = world.layer(SHAPE)
    whole1, whole2 = experts(MoEShape(256, 256, 4, 2))
    world.load(layer, whole1, whole2)
    l1 = tuple(
        torch.cat([each[:, n // 4 : n // 2], each[:, 3 * n // 4 :]], 1) for each in whole1 if (n := each.shape[1])
    )
    l2 = tuple(each[:, :, each.shape[2] // 2 :].contiguous() for each in whole2)
    of = batch(9, SHAPE)
    assert torch.equal(forward(world, layer, of), expected(of, l1, l2))


def test_batches_beyond_the_capacity(world, buffers, monkeypatch):
    monkeypatch.setattr("megamoe_jit.engines.local.LocalExperts.__init__.__defaults__", (128, FP8))
    layer, l1, l2 = loaded(world, routed_scaling_factor=2.0)
    of = batch(300, SHAPE)
    assert torch.equal(forward(world, layer, of), expected(of, l1, l2, factor=2.0))
    assert buffers[0].calls == [128, 128, 44]


def test_packed_experts(world, buffers):
    world.parallel.moe_ep_size, world.parallel.moe_ep_rank = 2, 1
    layer, l1, l2 = loaded_packed(world, swiglu_limit=10.0)
    world.load(layer, *from_disk((l1, l2)))  # once more, as an update does
    of = batch(9, MoEShape(256, 128, 8, 2))
    of.ids.clamp_(min=0)
    found = forward(world, layer, of)
    of.ids = torch.where(of.ids >= 4, of.ids - 4, -1)
    assert torch.equal(found, expected(of, l1, l2, 10.0))
    assert set(buffers[0].formats) == {"mxfp4"}


def test_a_shared_expert_among_packed_ones_is_refused_while_the_model_is_built(world):
    with pytest.raises(ConfigError, match="Next: without --enforce-shared-experts-fusion"):
        world.layer(MoEShape(256, 128, 5, 3), fp4=True, num_fused_shared_experts=1)


def test_no_tokens(world):
    layer, *_ = loaded(world)
    assert forward(world, layer, batch(0, SHAPE)).shape == (0, SHAPE.hidden)


def test_weights_are_updated_where_they_are(world):
    layer, *_ = loaded(world)
    l1, l2 = experts(SHAPE, seed=1)
    world.load(layer, l1, l2)
    of = batch(5, SHAPE)
    assert torch.equal(forward(world, layer, of), expected(of, l1, l2))


def test_an_update_of_weights_leaves_the_buffer_that_graphs_know(world):
    """Also where calls have more slots than the model says: nobody else would hold it then, and it would be freed."""
    layer, *_ = loaded(world)
    of = batch(5, MoEShape(256, 128, 4, 3))
    forward(world, layer, of)
    known = getattr(layer, _READY).run
    l1, l2 = experts(SHAPE, seed=1)
    world.load(layer, l1, l2)
    assert getattr(layer, _READY).run is known
    assert torch.equal(forward(world, layer, of), expected(of, l1, l2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation": "gelu"}, "allowed: gated silu"),
        ({"no_combine": True}, "no_combine"),
        ({"apply_router_weight_on_input": True}, "on the output"),
        ({"gemm1_alpha": 1.7}, "allowed: swiglu_limit"),
    ],
)
def test_what_there_is_no_kernel_for_is_refused_while_the_model_is_built(world, options, said):
    with pytest.raises(ConfigError, match=said):
        world.layer(SHAPE, **options)


def test_sizes_are_refused_before_anything_is_loaded(world):
    with pytest.raises(ConfigError, match="sizes of a rank: topk = 40"):
        world.layer(SimpleNamespace(hidden=256, intermediate=128, experts=64, topk=40))


def test_another_gpu_is_refused(world):
    world.module("layers.moe.mega_moe_sm90")._device_sm = 100
    with pytest.raises(ConfigError, match="allowed: Hopper"):
        world.layer(SHAPE)


def test_weights_as_another_process_left_them_are_refused(world):
    world.model.load_format = "sharded_state"
    with pytest.raises(ConfigError, match="--load-format sharded_state"):
        world.layer(SHAPE)


def test_weights_that_ranks_exchange_later_are_refused(world):
    world.parallel.dwdp_size = 2
    with pytest.raises(ConfigError, match="--dwdp-size"):
        world.layer(SHAPE)


def test_lora_on_experts_is_refused_as_it_starts(world):
    """SGLang makes a runner of its own for it, of the same backend."""
    layer = world.layer(SHAPE)
    make = world.module("layers.moe.moe_runner.runner").MoeRunner
    with pytest.raises(ConfigError, match="with experts by Fp8MoEMethod, or LoRA on them"):
        make(layer.runner.runner_backend, layer.moe_runner_config, lora_enabled=True)


def test_experts_of_another_quantisation_are_refused_as_it_starts(world):
    """As those of a draft model may be, which gets the runner of its target."""
    layer = world.layer(SHAPE)
    config = SimpleNamespace(layer=SimpleNamespace(quant_method=object()), silu_mul_keep_fp32=False)
    with pytest.raises(ConfigError, match="experts by object.* --speculative-moe-runner-backend"):
        world.module("layers.moe.moe_runner.runner").MoeRunner(layer.runner.runner_backend, config)
