"""The hooks of SGLang by themselves: ours for layers that were taken over, the original for all others."""

from __future__ import annotations

import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import MoEShape
from megamoe_jit.engines.across import _buffers
from megamoe_jit.engines.sglang import mega, runner, weights
from megamoe_jit.engines.sglang.hooks import PROBE, reaches
from tests.engines.standins import batch, expected, experts, kernels_by_reference

SHAPE = MoEShape(256, 128, 4, 2)
SIZES = {"num_experts": 4, "num_max_tokens_per_rank": 100, "num_topk": 2, "hidden": 256, "intermediate_hidden": 128}


@pytest.fixture
def buffers(monkeypatch):
    monkeypatch.setattr(mega, "_all_in_place", lambda: True)
    monkeypatch.setattr(mega, "_formats", {})
    monkeypatch.setattr(weights, "left_by_another", list)  # as no SGLang says
    _buffers.clear()
    yield kernels_by_reference(monkeypatch)
    _buffers.clear()


def layer(seed=0):
    l1, l2 = experts(SHAPE, seed)
    names = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")
    tensors = {
        name: torch.nn.Parameter(each.clone(), requires_grad=False) for name, each in zip(names, l1 + l2, strict=True)
    }
    plain = dict.fromkeys(("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"))
    config = SimpleNamespace(activation="silu", is_gated=True, apply_router_weight_on_input=False, **plain)
    return SimpleNamespace(**tensors, moe_runner_config=config), l1, l2


def original(*args, **kwargs):
    return ("original", args, kwargs)


def test_a_layer_from_loading_to_running(buffers):
    made, l1, l2 = layer()
    assert not mega._is_available(lambda _: False, made)
    mega._build(original, made)
    assert mega._is_available(lambda _: False, made)
    assert made._mega_moe_weights_built
    buffer = mega._buffer(original, None, **SIZES, mma_type="fp8xfp4")
    of = batch(5, SHAPE)
    found = mega._run(
        original,
        made,
        of.x,
        of.ids,
        of.weights,
        buffer,
        5,
        hidden_size=256,
        activation_clamp=0.0,
        routed_scaling_factor=2.0,
    )
    assert torch.equal(found, expected(of, l1, l2, 0.0, 2.0))


def test_others_go_where_they_went(buffers):
    other = SimpleNamespace()
    arguments = (other, 1, 2, 3, 4, 5)
    options = {"hidden_size": 6, "activation_clamp": 7, "routed_scaling_factor": 8}
    assert mega._run(original, *arguments, **options) == ("original", arguments, options)
    assert mega._is_available(lambda _: "theirs", other) == "theirs"
    name, given, more = mega._buffer(original, "group", **SIZES, mma_type="x", activation="situ")
    assert (name, given, more) == (
        "original",
        ("group", 4, 100, 2, 256, 128, 0),
        {"mma_type": "x", "activation": "situ"},
    )


def test_without_all_hooks_nothing_is_taken_over(buffers, monkeypatch):
    monkeypatch.setattr(mega, "_all_in_place", lambda: False)
    made, l1, _ = layer()
    assert mega._build(original, made)[0] == "original"
    assert weights.held_by(made) is None
    assert torch.equal(made.w13_weight.view(torch.uint8), l1[0].view(torch.uint8))


def test_shared_experts_in_the_kernel_are_refused_by_name(buffers):
    mega._build(original, layer()[0])
    with pytest.raises(ConfigError, match="num_shared_experts = 1"):
        mega._buffer(original, None, **SIZES, num_shared_experts=1, mma_type="fp8xfp4")


def test_loading_finds_plain_experts(buffers):
    made, l1, _ = layer()
    mega._build(original, made)
    seen = []
    for hook in (
        lambda: weights._load(lambda *_: seen.append(1), made),
        lambda: weights._restore(original, None, made),
    ):
        mega._build(original, made)
        hook()
        assert torch.equal(made.w13_weight.view(torch.uint8), l1[0].view(torch.uint8))
    assert seen == [1]


def test_memory_that_was_exchanged_is_taken_over_anew(buffers):
    made, *_ = layer()
    mega._build(original, made)
    other, *_ = layer(seed=1)
    first = weights.held_by(made)
    for name in ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv"):
        getattr(made, name).data = getattr(other, name).data
    mega._build(original, made)
    assert weights.held_by(made) is not first
    assert weights.held_by(made).ready


def test_every_hook_answers_a_probe():
    hooks = (mega._build, mega._build_packed, mega._is_available, mega._buffer, mega._run, weights._load)
    assert all(hook(original, PROBE) is PROBE for hook in hooks)
    assert weights._restore(original, None, PROBE) is PROBE


def test_what_is_not_hooked_is_found(monkeypatch):
    here = "tests.unit.engines.probed"
    module = SimpleNamespace(hooked=lambda *given: given[-1], plain=lambda *_: None, raises=lambda: None)
    import sys

    monkeypatch.setitem(sys.modules, here, module)
    assert reaches(f"{here}:hooked", 1)
    assert not any(reaches(f"{here}:{name}", 0) for name in ("plain", "raises", "gone"))


@pytest.mark.parametrize("method", [SimpleNamespace(), SimpleNamespace(runner=None), SimpleNamespace(runner=object())])
def test_methods_of_others_are_none_of_ours_whatever_they_run_with(method):
    assert weights._apply(original, method, "layer", "batch") == ("original", (method, "layer", "batch"), {})
    assert runner._process(original, method, "layer") == ("original", (method, "layer"), {})


def test_a_layer_that_was_taken_over_is_called_by_nobody_else(buffers):
    made, *_ = layer()
    assert weights._apply(original, None, made, "batch") == ("original", (None, made, "batch"), {})
    mega._build(original, made)
    with pytest.raises(ConfigError, match="SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK"):
        weights._apply(original, None, made, "batch")
    setattr(made, weights.RUN, lambda *given: given)
    assert weights._apply(original, "method", made, "batch") == ("method", "batch")


@pytest.mark.parametrize(
    ("sglangs", "named", "sm90", "asked"),
    [(True, "awq", False, True), (False, "fp8", True, True), (False, "fp8", False, False), (False, None, True, False)],
)
def test_sglang_is_asked_to_look_whether_batches_fit(monkeypatch, sglangs, named, sm90, asked):
    for name in ("sglang", "sglang.srt", "sglang.srt.runtime_context"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["sglang.srt.runtime_context"].get_platform = lambda: SimpleNamespace(is_sm90=sm90)
    checkpoint = None if named is None else {"quant_method": named}
    assert mega._needs_budget(lambda *_: sglangs, "AnyForCausalLM", checkpoint, None) is asked


def test_a_load_format_is_named_as_it_is_typed(monkeypatch):
    class LoadFormat(str, Enum):  # noqa: UP042, as SGLang has it: text made of it has the class's name
        REMOTE = "remote"

    for name in ("sglang", "sglang.srt", "sglang.srt.runtime_context"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for named, said in (("auto", []), ("remote", ["remote"]), (LoadFormat.REMOTE, ["remote"])):
        model = SimpleNamespace(load_format=named)
        sys.modules["sglang.srt.runtime_context"].get_model = lambda model=model: model
        found = list(weights.left_by_another())
        assert [each.partition(";")[0] for each in found] == [f"--load-format {each}" for each in said]


def test_a_runner_is_made_for_layers_that_were_looked_at_alone():
    with pytest.raises(ConfigError, match="experts by NoneType, or LoRA on them"):
        runner._core_of(SimpleNamespace())
