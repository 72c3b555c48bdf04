"""What vLLM's plug-in takes, and what it refuses while a model is built: before anything is loaded, with the reason."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace

import pytest

from megamoe_jit._errors import ConfigError
from tests.engines.test_vllm import FP8, NAME, RELEASES, SHAPE
from tests.engines.vllm_world import vllm_world

__all__ = ["RELEASES"]


@pytest.fixture
def world(release, buffers):
    with vllm_world(release) as made:
        made.start()
        yield made


def test_nothing_is_taken_that_was_not_named(world):
    assert world.chosen(None, FP8) is None
    assert world.chosen("fp8", FP8) is None


@pytest.mark.parametrize(
    "checkpoint",
    [{**FP8, "weight_block_size": None}, {**FP8, "weight_block_size": [1, 32]}, {"quant_method": "awq"}],
)
def test_other_checkpoints_are_refused_with_the_reason(world, checkpoint):
    with pytest.raises(ConfigError, match=r"weight_block_size .* allowed: 'fp8' with \[128, 128\]"):
        world.chosen(NAME, checkpoint)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"has_bias": True}, "biases"),
        ({"swiglu_alpha": 1.7}, "allowed: swiglu_limit"),
        ({"is_lora_enabled": True}, "--enable-lora"),
    ],
)
def test_layers_that_there_is_no_kernel_for_are_refused(world, options, said):
    with pytest.raises(ConfigError, match=said):
        world.layer(world.chosen(NAME, FP8), world.moe_config(SHAPE, **options))


@pytest.mark.parametrize(("asked", "said"), [("use_ubatching", "dual-batch"), ("enable_elastic_ep", "elastic-ep")])
def test_ways_to_run_a_batch_that_it_does_not_know_are_refused(world, asked, said):
    setattr(world.parallel, asked, True)
    with pytest.raises(ConfigError, match=said):
        world.layer(world.chosen(NAME, FP8), world.moe_config(SHAPE))


@pytest.mark.parametrize("named", ["sharded_state", "runai_streamer_sharded", "tensorizer"])
def test_weights_as_a_process_left_them_are_refused(world, named):
    """In the kernel's order, they would be brought into it once more."""
    world.loading.load_format = named
    with pytest.raises(ConfigError, match=f"--load-format {named}"):
        world.layer(world.chosen(NAME, FP8), world.moe_config(SHAPE))


def test_experts_that_are_placed_round_robin_are_refused(world):
    moe = world.moe_config(SHAPE, ranks=2, dp=2, ep=True)
    with pytest.raises(ConfigError, match="--expert-placement-strategy round_robin"):
        world.layer(world.chosen(NAME, FP8), moe, placement="round_robin")


@pytest.mark.parametrize("named", ["allgather_reducescatter", "deepep_low_latency"])
def test_ways_between_ranks_that_it_takes_the_place_of(world, named):
    """All but those for which vLLM lays out rows by expert."""
    moe = world.moe_config(SHAPE, ranks=2, dp=2, ep=True, all2all=named)
    refused = pytest.raises(ConfigError, match=f"--all2all-backend {named}; allowed: allgather_reducescatter")
    with refused if named == "deepep_low_latency" else contextlib.nullcontext():
        world.layer(world.chosen(NAME, FP8), moe)


def test_sums_that_vllm_leaves_to_another_kernel_are_refused(world):
    """Of a `--moe-backend` that reaches all ranks itself: this one would give a rank's part as the whole."""
    moe = world.moe_config(SHAPE, ranks=2, ep=True, all2all="passthrough")
    known = hasattr(moe.moe_parallel_config, "use_passthrough_all2all")  # since 0.32
    with pytest.raises(ConfigError, match="--moe-backend") if known else contextlib.nullcontext():
        world.layer(world.chosen(NAME, FP8), moe)


def test_sizes_are_refused_before_anything_is_loaded(world):
    with pytest.raises(ConfigError, match="intermediate = 192"):
        world.layer(world.chosen(NAME, FP8, "deepseek_v4"), world.moe_config(SimpleNamespace(
            hidden=256, intermediate=192, experts=4, topk=2
        )))  # fmt: skip


def test_experts_that_are_not_quantised_stay_with_vllm_with_one_line(world, caplog, monkeypatch):
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


def test_experts_of_another_format_are_refused(world, monkeypatch):
    """As in DeepSeek V4 with NVFP4, which vLLM has another method for."""
    quantization = world.chosen(NAME, FP8, "deepseek_v4")
    base = world.module("model_executor.layers.fused_moe.fused_moe_method_base").FusedMoEMethodBase
    other = type("NvFp4", (base,), dict.fromkeys(base.__abstractmethods__, lambda *_, **__: None))
    monkeypatch.setattr(type(quantization).__mro__[1], "get_quant_method", lambda _, layer, __: other(layer.moe_config))
    with pytest.raises(ConfigError, match="experts that vLLM runs by NvFp4"):
        world.layer(quantization, world.moe_config(SHAPE))


@pytest.mark.parametrize("moe", [None, "mxfp8"])
def test_experts_that_are_to_be_quantised_once_more_are_refused(world, moe):
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
def test_deepseek_v4_and_its_drafts(world, named, model_type, blocks):
    """A draft in the target's checkpoint has the quantisation of the target, and a model type of its own."""
    made = world.chosen(named, {**FP8, "weight_block_size": blocks}, model_type)
    assert isinstance(made, world.module("models.deepseek_v41.quant_config").DeepseekV4FP8Config)


def test_a_draft_of_another_model(world):
    assert type(world.chosen(NAME, FP8, "deepseek_mtp")).__name__ == "MegaMoeFp8Config"


def test_a_checkpoint_that_is_not_quantised_is_refused(world):
    """vLLM makes a quantisation without a word from the checkpoint."""
    registered = world.module("model_executor.layers.quantization")._CUSTOMIZED_METHOD_TO_QUANT_CONFIG[NAME]
    with pytest.raises(ConfigError, match="a checkpoint that is not quantised; allowed: 'fp8' with"):
        registered()


def test_another_gpu_is_refused(world):
    world.module("platforms").current_platform.is_device_capability = lambda _: False
    with pytest.raises(ConfigError, match="allowed: Hopper"):
        world.layer(world.chosen(NAME, FP8), world.moe_config(SHAPE))


def test_linear_layers_are_vllms_own(world):
    quantization = world.chosen(NAME, FP8)
    own = world.module("model_executor.layers.quantization.fp8")
    linear = world.module("model_executor.layers.linear").LinearBase
    layer = object.__new__(linear)
    assert type(quantization.get_quant_method(layer, "a.b")) is own.Fp8LinearMethod


def test_a_second_registration_changes_nothing(world):
    from megamoe_jit.engines.vllm import register

    package = world.module("model_executor.layers.quantization")
    before = dict(package._CUSTOMIZED_METHOD_TO_QUANT_CONFIG), list(package.QUANTIZATION_METHODS)
    register()
    assert (dict(package._CUSTOMIZED_METHOD_TO_QUANT_CONFIG), list(package.QUANTIZATION_METHODS)) == before


def test_its_own_check_of_configurations(world):
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
