"""The plug-in in SGLang's own sources: its loader, its quantisation method, its MegaMoE path and its runner."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import MoEShape
from megamoe_jit.engines.seams import misfits
from megamoe_jit.engines.sglang import seams
from megamoe_jit.engines.sglang.weights import held_by
from tests.engines.sglang_world import SglangWorld, sglang_world
from tests.engines.standins import Batch, batch, expected, experts, packed_experts

SHAPE = MoEShape(256, 128, 4, 2)
RELEASES = ("sglang", seams.TESTED)


@pytest.fixture
def world(release: Path):
    with sglang_world(release) as made:
        yield made


def routed(world: SglangWorld, layer, of, shape=SHAPE, **options):
    names = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "top_k": of.ids.shape[1]}
    run = world.module("layers.moe.mega_moe").run_mega_routed_experts
    return run(layer, of.x, of.ids, of.weights, num_tokens=of.x.shape[0], **{**names, **options})


def loaded(world: SglangWorld, shape=SHAPE, seed=0, **options):
    layer, (l1, l2) = world.layer(shape, **options), experts(shape, seed)
    world.load(layer, l1, l2)
    return layer, l1, l2


def moe_block(layer, of, **more):
    """What `forward_mega_moe` asks of a model's MoE block."""
    given = {
        "experts": layer, "mega_shared_l1_weights": None, "mega_shared_l2_weights": None, "alt_stream": None,
        "num_fused_shared_experts": 0, "n_shared_experts": 1, "layer_id": 0, "is_hash": False,
        "routed_scaling_factor_fused_in_topk": False, "routed_scaling_factor": 2.5,
        "config": SimpleNamespace(hidden_size=256, moe_intermediate_size=128, num_experts_per_tok=2),
        "gate": lambda *_, **__: None,
        "topk": lambda *_, **__: SimpleNamespace(topk_ids=of.ids, topk_weights=of.weights),
    }  # fmt: skip
    return SimpleNamespace(**{**given, **more})


def from_disk(pairs):
    """MXFP4 as checkpoints have it: int8, and e8m0."""
    return tuple((codes.view(torch.int8), exponents) for codes, exponents in pairs)


def loaded_packed(world: SglangWorld, seed=0, **options):
    layer, (l1, l2) = world.layer(SHAPE, fp4=True, **options), packed_experts(SHAPE, seed)
    world.load(layer, *from_disk((l1, l2)))
    return layer, l1, l2


def test_everything_that_is_relied_upon_is_there(release):
    assert misfits(seams.SHARED + seams.MEGA + seams.RUNNER, release / "sglang") == []


class TestMegaMoE:
    """`--moe-a2a-backend megamoe`."""

    @pytest.fixture(autouse=True)
    def _started(self, world, buffers):
        world.start(a2a="megamoe")

    @pytest.mark.parametrize("tokens", [1, 5, 64])
    @pytest.mark.parametrize(("clamp", "factor"), [(None, 1.0), (0.7, 2.5), (0.0, 1.0)])
    def test_routed_experts_equal_the_reference(self, world, buffers, tokens, clamp, factor):
        layer, l1, l2 = loaded(world)
        assert world.module("layers.moe.mega_moe").is_mega_moe_experts_ready(layer)
        of = batch(tokens, SHAPE)
        found = routed(world, layer, of, activation_clamp=clamp, routed_scaling_factor=factor)
        assert torch.equal(found, expected(of, l1, l2, clamp, factor))
        assert (buffers[0].group, buffers[0].prepared, len(buffers)) == (world.group, 1, 1)

    def test_a_rank_without_tokens_takes_part(self, world, buffers):
        layer, *_ = loaded(world)
        of = batch(0, SHAPE)
        of.ids = of.weights = None
        found = world.module("layers.moe.mega_moe").run_mega_routed_experts(
            layer, of.x, None, None, hidden_size=256, intermediate_size=128, top_k=2, num_tokens=0
        )
        assert found.shape == (0, SHAPE.hidden)
        assert buffers[0].calls == [0]

    def test_padding_gives_zeros(self, world):
        layer, l1, l2 = loaded(world)
        of = batch(6, SHAPE)
        of.ids[4:] = -1
        found = routed(world, layer, of)
        assert not found[4:].any()
        assert torch.equal(found, expected(of, l1, l2))

    def test_layers_of_a_model_share_one_buffer(self, world, buffers):
        of = batch(3, SHAPE)
        for seed in range(3):
            layer, l1, l2 = loaded(world, seed=seed)
            assert torch.equal(routed(world, layer, of), expected(of, l1, l2))
        assert len(buffers) == 1

    def test_shared_experts_fused_into_the_routed_ones(self, world, buffers):
        shape = MoEShape(256, 128, 5, 3)  # four routed ones, and one in a slot of its own
        layer, l1, l2 = loaded(world, shape, num_fused_shared_experts=1)
        of = batch(7, shape)
        of.ids[:, -1] = 4
        assert torch.equal(routed(world, layer, of, shape), expected(of, l1, l2))
        assert buffers[0].shape.topk == 3

    def test_shared_experts_beside(self, world, monkeypatch):
        layer, l1, l2 = loaded(world)
        of = batch(4, SHAPE)
        beside = torch.randn(4, SHAPE.hidden, dtype=torch.bfloat16)
        moe = moe_block(layer, of, _forward_shared_experts=lambda _: beside)
        mega = world.module("layers.moe.mega_moe")
        monkeypatch.setattr(mega, "should_use_mega_gate", lambda *_: False, raising=False)
        layer.moe_runner_config.swiglu_limit = 1.0
        found = mega.forward_mega_moe(moe, of.x)
        assert torch.equal(found, expected(of, l1, l2, 1.0, 2.5) + beside)

    def test_a_capture_forks_onto_its_side_stream(self, world, monkeypatch):
        layer, l1, l2 = loaded(world)
        of, order = batch(4, SHAPE), []

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                order.append((self.name, other.name))

        main, side = Stream("main"), Stream("side")
        mega = world.module("layers.moe.mega_moe")
        monkeypatch.setattr(mega, "get_is_capture_mode", lambda: True)
        monkeypatch.setattr(mega, "should_use_mega_gate", lambda *_: False, raising=False)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: main)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        moe = moe_block(layer, of, alt_stream=side, _forward_shared_experts=lambda _: None)
        assert torch.equal(mega.forward_mega_moe(moe, of.x), expected(of, l1, l2, factor=2.5))
        assert order == [("side", "main"), ("main", "side")]

    def test_weights_are_updated_where_they_are(self, world):
        layer, *_ = loaded(world)
        before = [each.data_ptr() for each in layer.parameters()]
        l1, l2 = experts(SHAPE, seed=1)
        layer.quant_method.restore_weights_before_loading(layer)
        assert not held_by(layer).ready
        world.load(layer, l1, l2)
        of = batch(5, SHAPE)
        assert torch.equal(routed(world, layer, of), expected(of, l1, l2))
        assert [each.data_ptr() for each in layer.parameters()] == before

    @pytest.mark.parametrize("changed", [[1], [0, 3], []])
    def test_some_experts_are_updated_without_a_word_before(self, world, changed):
        layer, l1, l2 = loaded(world)
        new1, new2 = experts(SHAPE, seed=1)
        world.load(layer, new1, new2, changed)
        for pair, new in ((l1, new1), (l2, new2)):
            for old, value in zip(pair, new, strict=True):
                old.view(torch.uint8)[changed] = value.view(torch.uint8)[changed]
        of = batch(9, SHAPE)
        assert torch.equal(routed(world, layer, of), expected(of, l1, l2))

    def test_experts_that_are_moved_as_slices_of_parameters(self, world):
        layer, l1, l2 = loaded(world)
        order = torch.tensor([2, 0, 3, 1])
        for parameter in layer.parameters():
            parameter.data.view(torch.uint8)[:] = parameter.data.view(torch.uint8)[order]
        of = batch(9, SHAPE)
        moved = [tuple(each.view(torch.uint8)[order].view(each.dtype) for each in pair) for pair in (l1, l2)]
        assert torch.equal(routed(world, layer, of), expected(of, *moved))

    def test_too_many_tokens_are_refused_by_sglang(self, world):
        layer, *_ = loaded(world)
        with pytest.raises(AssertionError, match="exceeds cap"):
            routed(world, layer, batch(8193, SHAPE))

    def test_batches_that_sglang_gives_to_other_kernels_are_refused(self, world):
        """It passes the path by for more tokens than fit, in models that have another: for weights in its own order."""
        layer, *_ = loaded(world)
        output = world.module("layers.moe.topk").StandardTopKOutput(*(None,) * 3)
        with pytest.raises(ConfigError, match="a smaller --chunked-prefill-size"):
            layer.run_moe_core(layer.dispatcher.dispatch(batch(3, SHAPE).x, output))

    @pytest.mark.parametrize(
        ("model", "checkpoint", "sm90", "asked"),
        [
            ("DeepseekV3ForCausalLM", {"quant_method": "fp8"}, True, True),
            ("DeepseekV3ForCausalLM", {"quant_method": "fp8"}, False, False),
            ("DeepseekV3ForCausalLM", {"quant_method": "awq"}, True, False),
            ("DeepseekV3ForCausalLM", {}, True, False),
            ("Qwen3MoeForCausalLM", {}, False, True),
        ],
    )
    def test_sglang_sees_as_it_starts_that_batches_fit(self, world, model, checkpoint, sm90, asked):
        world.module("runtime_context").get_platform = lambda: SimpleNamespace(is_sm90=sm90)
        assert world.module("arg_groups.mega_moe_hook").mega_moe_needs_token_budget(model, checkpoint, None) is asked

    def test_weights_as_another_process_left_them_stay_with_sglang(self, world, caplog):
        """SGLang writes them over what it has processed: in whichever order they are."""
        world.model.load_format = "sharded_state"
        with caplog.at_level(logging.WARNING, "megamoe_jit"):
            layer, *_ = loaded(world)
        assert held_by(layer) is None
        assert "--load-format sharded_state; allowed: checkpoints" in caplog.text

    def test_a_layer_that_computes_something_else_stays_with_sglang(self, world, caplog):
        with caplog.at_level(logging.WARNING, "megamoe_jit"):
            layer, *_ = loaded(world, gemm1_alpha=1.7)
        assert held_by(layer) is None
        assert layer._mega_moe_weights_built  # by SGLang's own builder
        assert "alpha, beta or a limit of gemm1; allowed: swiglu_limit" in caplog.text

    def test_a_layer_that_there_is_no_kernel_for_stays_as_it_was(self, world, caplog):
        layer = world.layer(SHAPE)
        layer.w13_weight_scale_inv.data = layer.w13_weight_scale_inv.data.to(torch.bfloat16)
        for parameter in layer.parameters():
            parameter.data.view(torch.uint8).zero_()
        before = layer.w13_weight.data.clone()
        with caplog.at_level(logging.WARNING, "megamoe_jit"):
            for _ in range(2):
                world.module("layers.moe.mega_moe_sm90").build_sm90_mega_moe_experts_weights(layer)
        assert held_by(layer) is None
        assert layer._mega_moe_sm90_fp8_weights  # SGLang's own builder had it
        assert torch.equal(layer.w13_weight.data.view(torch.uint8), before.view(torch.uint8))
        assert len(caplog.records) == 1
        assert "leaves experts of this model to SGLang" in caplog.text


class TestPackedExperts:
    """DeepSeek V4's MXFP4 as it is, by `--moe-a2a-backend megamoe`."""

    @pytest.fixture(autouse=True)
    def _started(self, world, buffers):
        world.start(a2a="megamoe")

    def test_they_run_without_conversion(self, world, buffers):
        layer, l1, l2 = loaded_packed(world)
        assert world.module("layers.moe.mega_moe").is_mega_moe_experts_ready(layer)
        assert layer.w13_weight.nbytes == l1[0].nbytes
        of = batch(9, SHAPE)
        assert torch.equal(routed(world, layer, of, activation_clamp=10.0), expected(of, l1, l2, 10.0))
        assert buffers[0].formats == ["mxfp4"]

    @pytest.mark.parametrize("changed", [None, [1]])
    def test_weights_are_updated_where_graphs_know_them(self, world, changed):
        layer, l1, l2 = loaded_packed(world)
        places = [each.data_ptr() for each in (*layer.mega_l1_weights, *layer.mega_l2_weights)]
        new1, new2 = packed_experts(SHAPE, seed=1)
        world.load(layer, *from_disk((new1, new2)), changed)
        which = range(4) if changed is None else changed
        for old, new in zip((*l1, *l2), (*new1, *new2), strict=True):
            old.view(torch.uint8)[list(which)] = new.view(torch.uint8)[list(which)]
        of = batch(9, SHAPE)
        assert torch.equal(routed(world, layer, of), expected(of, l1, l2))
        assert [each.data_ptr() for each in (*layer.mega_l1_weights, *layer.mega_l2_weights)] == places

    def test_experts_that_are_moved_as_slices_of_parameters(self, world):
        layer, l1, l2 = loaded_packed(world)
        order = torch.tensor([2, 0, 3, 1])
        for parameter in layer.parameters():
            parameter.data.view(torch.uint8)[:] = parameter.data.view(torch.uint8)[order]
        of = batch(9, SHAPE)
        moved = [tuple(each.view(torch.uint8)[order].view(each.dtype) for each in pair) for pair in (l1, l2)]
        assert torch.equal(routed(world, layer, of), expected(of, *moved))

    def test_parameters_are_what_the_kernel_reads_also_when_memory_was_exchanged(self, world):
        """SGLang moves experts as slices of them."""
        layer, l1, l2 = loaded_packed(world)
        names = ("w13_weight", "w2_weight", "w13_weight_scale_inv", "w2_weight_scale_inv")
        for name, new in zip(names, (l1[0], l2[0], l1[1].float(), l2[1].float()), strict=True):
            parameter = getattr(layer, name)
            parameter.data = new.clone().view(parameter.dtype) if new.dtype is torch.uint8 else new.clone()
        world.module("layers.moe.mega_moe").build_mega_moe_experts_weights(layer)
        of = batch(9, SHAPE)
        assert torch.equal(routed(world, layer, of), expected(of, l1, l2))
        read = {each.data_ptr() for each in (*layer.mega_l1_weights, *layer.mega_l2_weights)}
        assert {each.data_ptr() for each in layer.parameters()} == read

    def test_a_shared_expert_in_fp8_runs_beside(self, world, monkeypatch):
        """DeepSeek V4's: SGLang fuses it on other GPUs alone, and runs it itself here, whatever its switch says."""
        layer, l1, l2 = loaded_packed(world, swiglu_limit=10.0)
        of, mega = batch(9, SHAPE), world.module("layers.moe.mega_moe")
        shared = experts(MoEShape(256, 128, 1, 1), seed=7)

        def forward_shared(x):
            alone = Batch(x, torch.zeros(len(x), 1, dtype=torch.int32), torch.ones(len(x), 1))
            return expected(alone, *shared, 10.0)

        moe = moe_block(layer, of, _forward_shared_experts=forward_shared, shared_experts_is_fp8=True)
        moe.shared_experts_weight_block_size = [128, 128]
        monkeypatch.setattr(mega, "is_sm100_supported", lambda: False)
        monkeypatch.setattr(mega, "should_use_mega_gate", lambda *_: False, raising=False)
        fuse = world.module("environ").envs.SGLANG_OPT_DEEPGEMM_MEGA_MOE_FUSE_SHARED_EXPERTS
        with fuse.override(True):
            assert not mega.should_fuse_mega_moe_shared_experts(moe)
            found = mega.forward_mega_moe(moe, of.x)
        assert torch.equal(found, expected(of, l1, l2, 10.0, 2.5) + forward_shared(of.x))

    def test_a_shared_expert_among_them_is_refused_while_the_model_is_built(self, world):
        """What `--enforce-shared-experts-fusion` asks for, and SGLang fails to load."""
        with pytest.raises(ConfigError, match="Next: without --enforce-shared-experts-fusion"):
            world.layer(MoEShape(256, 128, 5, 3), fp4=True, num_fused_shared_experts=1)

    def test_scales_that_are_no_powers_of_two_stay_with_sglang(self, world, caplog):
        layer, l1, l2 = world.layer(SHAPE, fp4=True), *packed_experts(SHAPE)
        caplog.set_level(logging.WARNING, "megamoe_jit")
        with pytest.raises(ValueError, match="DeepGEMM MegaMoE"):  # SGLang's own builder, for sizes of other GPUs
            world.load(layer, *from_disk(((l1[0], l1[1].float() * 1.5), (l2[0], l2[1].float()))))
        assert held_by(layer) is None
        assert "powers of two" in caplog.text


def test_other_backends_are_left_alone(world, buffers):
    world.start()
    layer, l1, _ = loaded(world)
    assert held_by(layer) is None
    assert torch.equal(layer.w13_weight.data.view(torch.uint8), l1[0].view(torch.uint8))
    assert buffers == []


def test_a_hook_that_sglang_did_not_apply_leaves_all_layers_alone(world, buffers, caplog, monkeypatch):
    registry = world.module("plugins.hook_registry").HookRegistry
    applied = registry._apply_target.__func__

    def all_but_one(cls, target, hooks):
        if not target.endswith("run_sm90_mega_routed"):
            applied(cls, target, hooks)

    monkeypatch.setattr(registry, "_apply_target", classmethod(all_but_one))
    with caplog.at_level(logging.WARNING, "megamoe_jit"):
        world.start(a2a="megamoe")
        for _ in range(2):
            layer, *_ = loaded(world)
    assert held_by(layer) is None
    assert len(caplog.records) == 1
    assert "did not reach" in caplog.text
