"""The plug-in in vLLM's own sources: its quantisation override, its loader, and the driver of its modular kernel."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import MoEShape
from megamoe_jit.engines.seams import misfits
from megamoe_jit.engines.vllm import seams
from tests.engines.standins import Batch, Buffer, batch, expected, experts, packed_experts
from tests.engines.vllm_world import VllmWorld, vllm_world

SHAPE = MoEShape(256, 128, 4, 2)
RELEASES = ("vllm", seams.TESTED)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
NAME = "megamoe_jit"


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

    @pytest.mark.parametrize("packed", [False, True])
    def test_weights_that_vllm_reloads(self, world, packed):
        """Layer by layer, as `reload_weights` and its weight transfer do it: graphs know the addresses."""
        reload = world.module("model_executor.model_loader.reload.layerwise")
        draw = packed_experts if packed else experts

        def on_disk(seed):
            pairs = draw(SHAPE, seed)
            return [(codes.view(torch.int8), scales) for codes, scales in pairs] if packed else pairs

        layer = world.layer(world.chosen(NAME, FP8, "deepseek_v4" if packed else None), world.moe_config(SHAPE))
        with torch.device("cpu"):
            reload.record_metadata_for_reloading(layer)
            world.load(layer, *on_disk(0))
            before = [each.data_ptr() for each in layer.parameters()]
            for seed in (1, 2):
                reload.initialize_layerwise_reload(layer)
                world.load_into(layer, *on_disk(seed))
                reload.finalize_layerwise_reload(layer, None)
                of = batch(9, SHAPE)
                assert torch.equal(run(layer, of), expected(of, *draw(SHAPE, seed)))
        assert [each.data_ptr() for each in layer.parameters()] == before

    def test_weights_that_are_loaded_over_those_of_a_layer_are_refused(self, world):
        """By a program that calls a model's `load_weights` and knows nothing of the order that they are in."""
        layer, l1, l2 = loaded(world)
        with pytest.raises(ConfigError, match=r"Next: reload_weights\(\)"):
            world.load_into(layer, *experts(SHAPE, seed=1))
        of = batch(9, SHAPE)
        assert torch.equal(run(layer, of), expected(of, l1, l2))
        loader = layer.w13_weight.weight_loader
        assert loader.supports_moe_loading
        assert loader.__self__ is layer  # vLLM takes methods of a layer from its parameters, lest they hold it

    def test_weights_that_vllm_copies_as_it_offloads_them(self, world):
        """To the CPU and back, or into a buffer that layers share: each is other memory."""
        layer, l1, l2 = loaded(world)
        of = batch(9, SHAPE)
        for _ in range(2):
            for parameter in layer.parameters():
                parameter.data = parameter.data.clone()
            assert torch.equal(run(layer, of), expected(of, l1, l2))

    def test_copies_that_lie_where_those_of_the_call_before_lay(self, world):
        """As copies may that vLLM makes for each call, of all parameters of a layer or some: other tensors."""
        layer, l1, l2 = loaded(world)
        of = batch(9, SHAPE)
        run(layer, of)
        for name, parameter in list(layer.named_parameters()):
            there = torch.from_numpy(parameter.view(torch.uint8).numpy()).view(parameter.dtype)
            layer.register_parameter(name, torch.nn.Parameter(there, requires_grad=False))
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
