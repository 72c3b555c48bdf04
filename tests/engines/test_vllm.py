"""The plug-in in vLLM's own sources: its quantisation override, its loader, and the driver of its modular kernel."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import MoEShape
from megamoe_jit.engines.seams import misfits
from megamoe_jit.engines.vllm import seams
from tests.engines.standins import Batch, Buffer, batch, expected, experts, kernels_by_reference, packed_experts
from tests.engines.vllm_world import VllmWorld, vllm_world

SHAPE = MoEShape(256, 128, 4, 2)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
NAME = "megamoe_jit"


@pytest.fixture(scope="module", params=seams.TESTED)
def release(request: pytest.FixtureRequest, folder: Path) -> Path:
    return folder / f"vllm-{request.param}"


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> list[Buffer]:
    return kernels_by_reference(monkeypatch)


@pytest.fixture
def world(release: Path, buffers: list[Buffer]):
    with vllm_world(release) as made:
        made.start()
        yield made


def loaded(world: VllmWorld, seed=0, limit=None, **parallel):
    moe = world.moe_config(SHAPE, swiglu_limit=limit, **parallel)
    layer = world.layer(world.chosen(NAME, FP8), moe, swiglu_limit=limit)
    l1, l2 = experts(SHAPE, seed)
    world.load(layer, l1, l2)
    return layer, l1, l2


def run(layer, of):
    """`FusedMoEKernel.apply`, as `RoutedExperts` calls it."""
    return layer.forward_modular(of.x, of.weights, of.ids)


def local_ids(ids, rank):
    first = rank * SHAPE.experts
    return torch.where((ids >= first) & (ids < first + SHAPE.experts), ids - first, -1).to(ids.dtype)


def halves(whole1, whole2, rank):
    """The columns of one of two ranks."""
    quarters = [(each, each.shape[1] // 4) for each in whole1]
    l1 = tuple(torch.cat([each[:, (2 * half + rank) * n :][:, :n] for half in (0, 1)], 1) for each, n in quarters)
    return l1, tuple(each.chunk(2, 2)[rank].contiguous() for each in whole2)


def test_everything_that_is_relied_upon_is_there(release):
    assert misfits(seams.SEAMS, release / "vllm") == []


class TestOneRank:
    @pytest.mark.parametrize("tokens", [1, 5, 64])
    @pytest.mark.parametrize("limit", [None, 0.7])
    def test_the_driver_equals_the_reference(self, world, tokens, limit):
        layer, l1, l2 = loaded(world, limit=limit)
        of = batch(tokens, SHAPE)
        assert torch.equal(run(layer, of), expected(of, l1, l2, limit))
        assert not layer.quant_method.moe_kernel.output_is_reduced()

    def test_int64_ids_and_padding(self, world):
        layer, l1, l2 = loaded(world)
        of = batch(6, SHAPE)
        of.ids = of.ids.long()
        of.ids[4:] = -1
        assert torch.equal(run(layer, of), expected(of, l1, l2))

    def test_batches_beyond_the_capacity(self, world, buffers):
        layer, l1, l2 = loaded(world, tokens=100)
        of = batch(300, SHAPE)
        assert torch.equal(run(layer, of), expected(of, l1, l2))
        assert buffers[0].calls == [128, 128, 44]

    def test_layers_share_one_buffer_and_kernels_are_prepared_before(self, world, buffers):
        for seed in range(2):
            loaded(world, seed)
        assert len(buffers) == 1
        assert buffers[0].prepared >= 1

    def test_weights_that_are_processed_elsewhere_and_copied_over(self, world):
        layer, *_ = loaded(world)
        before = [each.data_ptr() for each in layer.parameters()]
        fresh, l1, l2 = loaded(world, seed=1)  # as vLLM reloads a layer under its graphs
        for mine, new in zip(layer.parameters(), fresh.parameters(), strict=True):
            mine.data.view(torch.uint8).copy_(new.data.view(torch.uint8))
        of = batch(9, SHAPE)
        assert torch.equal(run(layer, of), expected(of, l1, l2))
        assert [each.data_ptr() for each in layer.parameters()] == before

    def test_weights_that_vllm_copies_as_it_offloads_them(self, world):
        """To the CPU and back, or into a buffer that layers share: each is other memory."""
        layer, l1, l2 = loaded(world)
        of = batch(9, SHAPE)
        for _ in range(2):
            for parameter in layer.parameters():
                parameter.data = parameter.data.clone()
            assert torch.equal(run(layer, of), expected(of, l1, l2))

    def test_experts_that_eplb_moves(self, world):
        layer, l1, l2 = loaded(world)
        order = torch.tensor([2, 0, 3, 1])
        for weights in layer.get_expert_weights():
            weights.view(torch.uint8)[:] = weights.view(torch.uint8)[order]
        of = batch(9, SHAPE)
        moved = [tuple(each.view(torch.uint8)[order].view(each.dtype) for each in pair) for pair in (l1, l2)]
        assert torch.equal(run(layer, of), expected(of, *moved))


class TestManyRanks:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_expert_parallel_without_data_parallel(self, world, rank):
        layer, l1, l2 = loaded(world, ranks=2, rank=rank, ep=True)
        of = batch(9, MoEShape(256, 128, 8, 2))
        found = run(layer, of)
        of.ids = local_ids(of.ids, rank)
        assert torch.equal(found, expected(of, l1, l2))
        assert not layer.quant_method.moe_kernel.output_is_reduced()  # vLLM sums over the ranks

    def test_tensor_parallel(self, world):
        moe = world.moe_config(SHAPE, ranks=2, rank=1)
        layer = world.layer(world.chosen(NAME, FP8), moe)
        whole1, whole2 = experts(MoEShape(256, 256, 4, 2))
        world.load(layer, whole1, whole2)
        of = batch(9, SHAPE)
        assert torch.equal(run(layer, of), expected(of, *halves(whole1, whole2, 1)))

    def test_data_parallel_without_expert_parallel(self, world):
        """vLLM gathers the tokens of all ranks, more than one rank's most, and scatters what they sum up to."""
        moe = world.moe_config(SHAPE, ranks=2, rank=0, dp=2, tokens=128)
        layer = world.layer(world.chosen(NAME, FP8), moe)
        whole1, whole2 = experts(MoEShape(256, 256, 4, 2))
        world.load(layer, whole1, whole2)
        mine, other = batch(128, SHAPE), batch(128, SHAPE, seed=1)
        gathered = Batch(*(torch.cat(each) for each in zip(vars(mine).values(), vars(other).values(), strict=True)))
        summed = []

        def combine(y, **_):
            summed.append(y)
            return y[:128]

        world.ep_group.dispatch = lambda *_, **__: (gathered.x, gathered.weights, gathered.ids)
        world.ep_group.allocate_combine_input = lambda *_, **__: None
        world.ep_group.combine = combine
        world.ep_group.combine_into_output = lambda y, into, **_: into.copy_(combine(y))
        found = run(layer, mine)
        l1, l2 = halves(whole1, whole2, 0)
        wanted = expected(gathered, l1, l2)
        assert torch.equal(summed[0], wanted)
        assert torch.equal(found, wanted[:128])

    def test_data_and_expert_parallel_is_one_collective_launch(self, world, buffers, monkeypatch):
        layer, *_ = loaded(world, ranks=2, rank=1, dp=2, ep=True, tokens=300)
        seen = []
        monkeypatch.setattr("megamoe_jit._layer.from_bf16.mega_moe_from_bf16", lambda *a, **k: seen.append((a, k)))
        of = batch(7, MoEShape(256, 128, 8, 2))
        run(layer, of)
        (x, ids, weights, l1, _, buffer), options = seen[0][0], seen[0][1]
        assert (buffer.group, buffer.shape, buffer.num_max_tokens_per_rank) == (
            world.group, MoEShape(256, 128, 8, 2), 384
        )  # fmt: skip
        assert torch.equal(ids, of.ids)  # of all ranks
        assert x is of.x
        assert weights is of.weights
        assert l1[0].data_ptr() == layer.w13_weight.data_ptr()
        assert options["y"].shape == of.x.shape
        assert layer.quant_method.moe_kernel.output_is_reduced()

    def test_a_rank_without_tokens_takes_part(self, world, monkeypatch):
        """vLLM calls no experts for such a batch: the other ranks would wait for this one's launch."""
        layer, *_ = loaded(world, ranks=2, rank=1, dp=2, ep=True)
        seen = []
        monkeypatch.setattr("megamoe_jit._layer.from_bf16.mega_moe_from_bf16", lambda x, *_, **__: seen.append(x))
        of = batch(0, MoEShape(256, 128, 8, 2))
        assert run(layer, of).shape == (0, 256)
        assert [each.shape for each in seen] == [(0, 256)]

    def test_experts_that_are_not_rank_by_rank_are_refused(self, world):
        moe = world.moe_config(SHAPE, ranks=2, dp=2, ep=True)
        layer = world.layer(world.chosen(NAME, FP8), moe)
        layer._expert_map = torch.tensor([0, -1, 1, -1, 2, -1, 3, -1], dtype=torch.int32)
        with pytest.raises(ConfigError, match="placement-strategy linear"):
            world.load(layer, *experts(SHAPE))

    @pytest.mark.parametrize(("chosen", "bounded"), [(NAME, True), ("fp8", False)])
    def test_eplb_leaves_nccl_room(self, world, monkeypatch, chosen, bounded):
        monkeypatch.delenv("NCCL_MAX_CTAS", raising=False)
        world.config.model_config.quantization = chosen
        parallel = SimpleNamespace(
            data_parallel_size=2, enable_eplb=True, eplb_config=SimpleNamespace(communicator="torch_nccl")
        )
        world.module("distributed.eplb.eplb_utils").override_envs_for_eplb(parallel, "auto")
        assert ("NCCL_MAX_CTAS" in os.environ) is bounded
        monkeypatch.delenv("NCCL_MAX_CTAS", raising=False)


class TestPackedExperts:
    """DeepSeek V4 on Hopper: MXFP4 as it is."""

    def packed(self, world, seed=0, **parallel):
        quantization = world.chosen(NAME, FP8, "deepseek_v4")
        layer = world.layer(quantization, world.moe_config(SHAPE, swiglu_limit=10.0, **parallel), swiglu_limit=10.0)
        l1, l2 = packed_experts(SHAPE, seed)
        world.load(layer, *((codes.view(torch.int8), exponents) for codes, exponents in (l1, l2)))
        return layer, l1, l2

    def test_they_run_without_conversion(self, world, buffers):
        layer, l1, l2 = self.packed(world)
        assert layer.w13_weight.nbytes == l1[0].nbytes
        of = batch(9, SHAPE)
        assert torch.equal(run(layer, of), expected(of, l1, l2, 10.0))
        assert buffers[0].formats == ["mxfp4"]

    def test_expert_parallel(self, world):
        layer, l1, l2 = self.packed(world, ranks=2, rank=1, ep=True)
        of = batch(9, MoEShape(256, 128, 8, 2))
        found = run(layer, of)
        of.ids = local_ids(of.ids, 1)
        assert torch.equal(found, expected(of, l1, l2, 10.0))

    def test_data_and_expert_parallel_prepares_kernels_of_the_format(self, world, buffers):
        self.packed(world, ranks=2, dp=2, ep=True)
        assert (buffers[0].group, buffers[0].formats) == (world.group, ["mxfp4"])

    def test_experts_that_eplb_moves(self, world):
        layer, l1, l2 = self.packed(world)
        order = torch.tensor([2, 0, 3, 1])
        for weights in layer.get_expert_weights():
            weights.view(torch.uint8)[:] = weights.view(torch.uint8)[order]
        of = batch(9, SHAPE)
        moved = [tuple(each.view(torch.uint8)[order].view(each.dtype) for each in pair) for pair in (l1, l2)]
        assert torch.equal(run(layer, of), expected(of, *moved, 10.0))

    def test_weights_that_are_processed_elsewhere_and_copied_over(self, world):
        layer, *_ = self.packed(world)
        fresh, l1, l2 = self.packed(world, seed=1)
        for mine, new in zip(layer.parameters(), fresh.parameters(), strict=True):
            mine.data.view(torch.uint8).copy_(new.data.view(torch.uint8))
        of = batch(9, SHAPE)
        assert torch.equal(run(layer, of), expected(of, l1, l2, 10.0))

    def test_a_second_processing_changes_nothing(self, world):
        layer, l1, l2 = self.packed(world)
        layer.quant_method.process_weights_after_loading(layer)
        of = batch(9, SHAPE)
        assert torch.equal(run(layer, of), expected(of, l1, l2, 10.0))

    @pytest.mark.parametrize("across", [False, True])
    def test_its_shared_expert_in_fp8_runs_beside(self, world, monkeypatch, across):
        """vLLM calls it itself, before the experts where it has no other stream, and never leaves it to the kernel."""
        monkeypatch.setattr(world.module("envs"), "VLLM_DISABLE_SHARED_EXPERTS_STREAM", True)
        layer, *_ = self.packed(world, **({"ranks": 2, "dp": 2, "ep": True} if across else {}))
        runner = world.module("model_executor.layers.fused_moe.runner.shared_experts")
        moe, method = layer.moe_config, layer.quant_method
        called: list[torch.Tensor] = []
        shared = runner.SharedExperts(
            lambda x: called.append(x) or 2 * x, moe, False, lambda: method.mk_can_overlap_shared_experts
        )
        of = batch(9, SHAPE)
        monkeypatch.setattr("megamoe_jit._layer.from_bf16.mega_moe_from_bf16", lambda *_, y, **__: y.zero_())
        layer.forward_modular(of.x, of.weights, of.ids, shared_experts=shared, shared_experts_input=of.x)
        assert called == []
        shared(of.x, runner.SharedExpertsOrder.NO_OVERLAP)
        assert torch.equal(shared.output, 2 * of.x)

    def test_its_fp8_experts_too(self, world):
        quantization = world.chosen(NAME, FP8, "deepseek_v41")
        world.config.model_config.hf_config.expert_dtype = "fp8"
        layer = world.layer(quantization, world.moe_config(SHAPE))
        l1, l2 = experts(SHAPE)
        world.load(layer, l1, l2)
        of = batch(3, SHAPE)
        assert torch.equal(run(layer, of), expected(of, l1, l2))


class TestChoice:
    def test_nothing_is_taken_that_was_not_named(self, world):
        assert world.chosen(None, FP8) is None
        assert world.chosen("fp8", FP8) is None

    @pytest.mark.parametrize(
        "checkpoint",
        [{**FP8, "weight_block_size": None}, {**FP8, "weight_block_size": [1, 32]}, {"quant_method": "awq"}],
    )
    def test_other_checkpoints_are_refused_with_the_reason(self, world, checkpoint):
        with pytest.raises(ConfigError, match=r"weight_block_size .* allowed: 'fp8' with \[128, 128\]"):
            world.chosen(NAME, checkpoint)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"has_bias": True}, "biases"),
            ({"swiglu_alpha": 1.7}, "allowed: swiglu_limit"),
            ({"is_lora_enabled": True}, "LoRA"),
        ],
    )
    def test_layers_that_there_is_no_kernel_for_are_refused(self, world, options, said):
        with pytest.raises(ConfigError, match=said):
            world.layer(world.chosen(NAME, FP8), world.moe_config(SHAPE, **options))

    @pytest.mark.parametrize(("asked", "said"), [("use_ubatching", "dual-batch"), ("enable_elastic_ep", "elastic-ep")])
    def test_ways_to_run_a_batch_that_it_does_not_know_are_refused(self, world, asked, said):
        setattr(world.parallel, asked, True)
        with pytest.raises(ConfigError, match=said):
            world.layer(world.chosen(NAME, FP8), world.moe_config(SHAPE))

    def test_sums_that_vllm_leaves_to_another_kernel_are_refused(self, world):
        """Of a `--moe-backend` that reaches all ranks itself: this one would give a rank's part as the whole."""
        moe = world.moe_config(SHAPE, ranks=2, ep=True, all2all="passthrough")
        known = hasattr(moe.moe_parallel_config, "use_passthrough_all2all")  # since 0.32
        with pytest.raises(ConfigError, match="--moe-backend") if known else contextlib.nullcontext():
            world.layer(world.chosen(NAME, FP8), moe)

    def test_sizes_are_refused_before_anything_is_loaded(self, world):
        with pytest.raises(ConfigError, match="intermediate = 192"):
            world.layer(world.chosen(NAME, FP8, "deepseek_v4"), world.moe_config(SimpleNamespace(
                hidden=256, intermediate=192, experts=4, topk=2
            )))  # fmt: skip

    def test_experts_that_are_not_quantised_stay_with_vllm_with_one_line(self, world, caplog, monkeypatch):
        quantization = world.chosen(NAME, FP8)
        own = world.module("model_executor.layers.fused_moe.unquantized_fused_moe_method")
        own.select_unquantized_moe_backend = lambda **_: (None, None)
        monkeypatch.setattr(own.CustomOp, "enabled", classmethod(lambda _: False))
        world.module("model_executor.layers.quantization.fp8").is_layer_skipped = lambda **_: True
        with caplog.at_level(logging.WARNING, "megamoe_jit"):
            for _ in range(2):
                layer = object.__new__(world.module("model_executor.layers.fused_moe.routed_experts").RoutedExperts)
                vars(layer).update(moe_config=world.moe_config(SHAPE))
                assert type(quantization.get_quant_method(layer, "experts")) is own.UnquantizedFusedMoEMethod
        assert [each.message for each in caplog.records] == [
            "megamoe-jit leaves experts that are not quantised to vLLM, as those of experts"
        ]

    def test_experts_of_another_format_are_refused(self, world, monkeypatch):
        """As in DeepSeek V4 with NVFP4, which vLLM has another method for."""
        quantization = world.chosen(NAME, FP8, "deepseek_v4")
        base = world.module("model_executor.layers.fused_moe.fused_moe_method_base").FusedMoEMethodBase
        other = type("NvFp4", (base,), dict.fromkeys(base.__abstractmethods__, lambda *_, **__: None))
        monkeypatch.setattr(
            type(quantization).__mro__[1], "get_quant_method", lambda _, layer, __: other(layer.moe_config)
        )
        with pytest.raises(ConfigError, match="experts that vLLM runs by NvFp4"):
            world.layer(quantization, world.moe_config(SHAPE))

    @pytest.mark.parametrize("moe", [None, "mxfp8"])
    def test_experts_that_are_to_be_quantised_once_more_are_refused(self, world, moe):
        quantization = world.chosen(NAME, FP8)
        asked = SimpleNamespace(moe=moe, targets=None, linear="fp8")
        quantization.online_quantization_config = SimpleNamespace(
            args=asked, resolve_quant_method_cls=lambda *_: None, packed_modules_mapping={}
        )
        with pytest.raises(ConfigError, match="--quantization-config") if moe else contextlib.nullcontext():
            world.layer(quantization, world.moe_config(SHAPE))

    @pytest.mark.parametrize("blocks", [[128, 128], [32, 32]])
    @pytest.mark.parametrize(
        ("named", "model_type"),
        [(NAME, "deepseek_v4"), (NAME, "deepseek_v41_text"), ("megamoe_jit_deepseek_v4", "deepseek_mtp")],
    )
    def test_deepseek_v4_and_its_drafts(self, world, named, model_type, blocks):
        """A draft in the target's checkpoint has the quantisation of the target, and a model type of its own."""
        made = world.chosen(named, {**FP8, "weight_block_size": blocks}, model_type)
        assert isinstance(made, world.module("models.deepseek_v41.quant_config").DeepseekV4FP8Config)

    def test_a_draft_of_another_model(self, world):
        assert type(world.chosen(NAME, FP8, "deepseek_mtp")).__name__ == "MegaMoeFp8Config"

    def test_a_checkpoint_that_is_not_quantised_is_refused(self, world):
        """vLLM makes a quantisation without a word from the checkpoint."""
        registered = world.module("model_executor.layers.quantization")._CUSTOMIZED_METHOD_TO_QUANT_CONFIG[NAME]
        with pytest.raises(ConfigError, match="a checkpoint that is not quantised; allowed: 'fp8' with"):
            registered()

    def test_another_gpu_is_refused(self, world):
        world.module("platforms").current_platform.is_device_capability = lambda _: False
        with pytest.raises(ConfigError, match="allowed: Hopper"):
            world.layer(world.chosen(NAME, FP8), world.moe_config(SHAPE))

    def test_linear_layers_are_vllms_own(self, world):
        quantization = world.chosen(NAME, FP8)
        own = world.module("model_executor.layers.quantization.fp8")
        linear = world.module("model_executor.layers.linear").LinearBase
        layer = object.__new__(linear)
        assert type(quantization.get_quant_method(layer, "a.b")) is own.Fp8LinearMethod

    def test_a_second_registration_changes_nothing(self, world):
        from megamoe_jit.engines.vllm import register

        package = world.module("model_executor.layers.quantization")
        before = dict(package._CUSTOMIZED_METHOD_TO_QUANT_CONFIG), list(package.QUANTIZATION_METHODS)
        register()
        assert (dict(package._CUSTOMIZED_METHOD_TO_QUANT_CONFIG), list(package.QUANTIZATION_METHODS)) == before

    def test_its_own_check_of_configurations(self, world):
        """What an engine that chooses among registered backends asks."""
        from megamoe_jit.engines.vllm.experts import experts_class

        keys = world.module("model_executor.layers.quantization.utils.quant_utils")
        standard = world.module("model_executor.layers.fused_moe.modular_kernel").FusedMoEActivationFormat
        ours = experts_class()
        ask = ours.is_supported_config
        scheme = keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym
        assert ask(ours, world.moe_config(SHAPE), *scheme, standard.Standard) == (True, None)
        assert not ask(ours, world.moe_config(SHAPE), keys.kFp8StaticTensorSym, None, standard.Standard)[0]
        assert not ask(ours, world.moe_config(SHAPE), *scheme, standard.BatchedExperts)[0]
