"""Arguments of a wrong type: a `ConfigError` that says what was given and what is allowed, never another error."""

from __future__ import annotations

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._layer import workspace as _workspace
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit.heuristics import preset
from tests.unit.layer.test_calls import HERE, Cuda, cuda  # noqa: F401

SHAPE = mm.MoEShape(256, 128, 4, 2)
SPEC = mm.KernelSpec(SHAPE, mm.Variant.PINGPONG)
Y = torch.zeros(3, 256, dtype=torch.bfloat16)
STATS = torch.zeros(4, dtype=torch.int32)
L1 = mm.quantize_weights(torch.zeros(4, 256, 256))
L2 = mm.quantize_weights(torch.zeros(4, 256, 128))
ORDERED = mm.transform_weights_for_mega_moe_sm90(L1, L2)
CALL = {"y": Y, "l1_weights": ORDERED[0], "l2_weights": ORDERED[1]}


@pytest.fixture
def buffer(cuda: Cuda) -> SymmBuffer:  # noqa: F811
    """A buffer on the CPU, whose launches `cuda` keeps account of."""
    return SymmBuffer(SHAPE, 128, HERE)


def refused(call, *says: str) -> None:
    with pytest.raises(mm.ConfigError) as caught:
        call()
    for part in says:
        assert part in str(caught.value)


@pytest.mark.parametrize("field", ["hidden", "intermediate", "experts", "topk"])
@pytest.mark.parametrize("value", [4096.0, "256", True, None, [1]])
def test_sizes_of_a_shape(field: str, value: object):
    sizes = {"hidden": 4096, "intermediate": 2048, "experts": 256, "topk": 6}
    says = f"{field} = {value!r} is not supported; allowed: an integer"
    refused(lambda: mm.MoEShape(**{**sizes, field: value}), says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("v4-flash", mm.Variant.PINGPONG), "shape = 'v4-flash' is not supported; allowed: a MoEShape"),
        ((SHAPE, "pingpong"), "variant = 'pingpong' is not supported; allowed: a member of Variant"),
        ((SHAPE, mm.Variant.PINGPONG, "2"), "ranks = '2' is not supported; allowed: an integer"),
        ((SHAPE, mm.Variant.PINGPONG, True), "ranks = True"),
    ],
)
def test_parts_of_a_spec(arguments: tuple, says: str):
    refused(lambda: mm.KernelSpec(*arguments), says)


@pytest.mark.parametrize("given", ["v4-flash", None, preset("v4-flash")])
def test_enumerate_specs_wants_a_shape(given: object):
    refused(lambda: mm.enumerate_specs(given), f"shape = {given!r}"[:70], 'preset("v4-flash").shape')


@pytest.mark.parametrize("variants", ["pingpong", mm.Variant.PINGPONG, 3, ["pingpong"]])
def test_enumerate_specs_wants_variants(variants: object):
    refused(lambda: mm.enumerate_specs(SHAPE, variants=variants), "variant", "pingpong" if variants != 3 else "3")


@pytest.mark.parametrize("given", ["v4-flash", None, SPEC, SHAPE, ["v4-flash"], [SPEC, "v4-flash"], [[SPEC]]])
def test_warmup_wants_specs_and_says_where_they_come_from(given: object):
    refused(lambda: mm.warmup(given), "allowed: several KernelSpecs", 'enumerate_specs(preset("v4-flash").shape)')
    assert mm.enumerate_specs(preset("v4-flash").shape), "what the message advises"


@pytest.mark.parametrize("jobs", ["2", 1.5, True, 0, -1])
def test_warmup_wants_a_number_of_threads(jobs: object):
    refused(lambda: mm.warmup([], jobs), f"jobs = {jobs!r}", "an integer")
    assert mm.warmup(iter(()), 1) == []


@pytest.mark.parametrize("given", [None, [[1.0]], [1, 2], 3, "x"])
def test_quantisers_want_tensors(given: object):
    tensor, kind = torch.zeros(128, 128), type(given).__name__
    for call in (
        lambda: mm.quantize_activations(given),
        lambda: mm.quantize_weights(given),
        lambda: mm.dequantize_activations(given, tensor),
        lambda: mm.dequantize_activations(tensor, given),
        lambda: mm.dequantize_weights(given, tensor),
        lambda: mm.dequantize_weights(tensor, given),
    ):
        refused(call, f"{kind} given; allowed: a torch.Tensor")


@pytest.mark.parametrize("function", ["transform", "inverse_transform"])
def test_the_interleave_wants_pairs_and_numbers(function: str):
    call = getattr(mm, f"{function}_weights_for_mega_moe_sm90")
    refused(lambda: call(None, L2), "l1: NoneType given; allowed: a pair of tensors, codes and scales")
    refused(lambda: call(L1, L2[0]), "l2: Tensor given; allowed: a pair of tensors")
    refused(lambda: call((*L1, None), L2), "l1: tuple of 3 given; allowed: a pair of tensors")
    refused(lambda: call((L1[0], [1.0]), L2), "l1 scales: list given; allowed: a torch.Tensor")
    for experts in (3, ["0"], [0.5], [None]):
        refused(lambda e=experts: call(L1, L2, experts=e), f"experts = {experts!r}; allowed: distinct local experts")
    given = (list(L1), L2) if function == "transform" else ORDERED
    call(*given, experts=torch.tensor([0, 2]))


@pytest.mark.parametrize("force", [mm.fp8_mega_moe, mm.fp8_mega_moe_pingpong])
def test_a_call_without_a_buffer(force):
    refused(lambda: force(Y, L1, L2, None), "sym_buffer: NoneType given; allowed: a SymmBuffer, of get_symm_buffer")
    refused(lambda: force(Y, L1, L2, Y), "sym_buffer: Tensor given")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"y": None}, "y: NoneType given; allowed: a torch.Tensor"),
        ({"y": [[1.0]]}, "y: list given; allowed: a torch.Tensor"),
        ({"y": Y[0]}, "y has shape (256,); allowed: [tokens, 256]"),
        ({"y": Y[None]}, "y has shape (1, 3, 256); allowed: [tokens, 256]"),
        ({"y": Y.float().numpy()}, "y has dtype float32; allowed: torch.bfloat16"),
        ({"l1_weights": None}, "l1: NoneType given; allowed: a pair of tensors"),
        ({"l2_weights": L2[0]}, "l2: Tensor given; allowed: a pair of tensors"),
        ({"l2_weights": (L2[0],)}, "l2: tuple of 1 given; allowed: a pair of tensors"),
        ({"l1_weights": (None, L1[1])}, "l1 weights: NoneType given; allowed: a torch.Tensor"),
        ({"cumulative_local_expert_recv_stats": [0, 0]}, "recv_stats: list given; allowed: a torch.Tensor"),
        ({"recipe": None}, "recipe = None is not supported; allowed: (128, 128, 128)"),
        ({"recipe": 128}, "recipe = 128 is not supported"),
        ({"activation": None}, "activation = None is not supported; allowed: 'swiglu'"),
        ({"activation_clamp": "10"}, "activation_clamp = '10' is not supported; allowed: 0 or a positive number that"),
        ({"activation_clamp": [10.0]}, "activation_clamp = [10.0] is not supported"),
    ],
)
def test_a_call_with_one_wrong_argument_launches_nothing(
    cuda: Cuda,  # noqa: F811
    buffer: SymmBuffer,
    wrong: dict,
    says: str,
):
    refused(lambda: mm.fp8_mega_moe(**{**CALL, "sym_buffer": buffer, **wrong}), says)
    assert cuda.launches == []
    mm.fp8_mega_moe(**CALL, sym_buffer=buffer, cumulative_local_expert_recv_stats=STATS, activation_clamp=10)
    mm.fp8_mega_moe(**CALL, sym_buffer=buffer, recipe=[128, 128, 128])
    assert [launch.params.clamp for launch in cuda.launches] == [10.0, float("inf")]


def test_sizes_of_a_buffer():
    for sizes in ((4, "8", 2, 256, 128), (4, 8.0, 2, 256, 128)):
        refused(lambda s=sizes: mm.get_symm_buffer_for_mega_moe(None, *s), "num_max_tokens_per_rank", "an integer")
    refused(lambda: mm.get_symm_buffer_for_mega_moe(None, "4", 8, 2, 256, 128), "experts = '4'", "an integer")
    refused(
        lambda: mm.get_symm_buffer_for_mega_moe(None, 4, 8, 2, 256, 128, max_pool_rows=None), "max_pool_rows = None"
    )


def test_a_layer_and_its_call(cuda: Cuda, buffer: SymmBuffer, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    refused(lambda: mm.MegaMoE(None, L2, topk=2, max_tokens=3), "w13: NoneType given; allowed: a pair of tensors")
    refused(lambda: mm.MegaMoE(L1, [[1.0]], topk=2, max_tokens=3), "w2: list of 1 given; allowed: a pair of tensors")
    sizes = {"topk": 2, "max_tokens": 3}
    for (w13, w2), wrong, says in (
        ((L1[0], L2), {}, "w13 has dtype torch.float8_e4m3fn; allowed: bfloat16, float16 or float32, or a pair"),
        ((L1, torch.zeros(2, 256)), {}, "w2 has 2 dimensions; allowed: 3"),
        ((torch.zeros(4, 255, 256), L2), {}, "w13 has 255 rows; allowed: gate rows and as many up rows"),
        ((L1, torch.zeros(4, 128, 256)), {}, "w2 has shape (4, 128, 256); allowed: (4, 256, 128), to fit w13"),
        ((L1, L2), {"clamp": -1.0}, "clamp = -1.0 is not supported; allowed: 0 or a positive number that"),
        ((torch.zeros(2, 200, 256), torch.zeros(2, 256, 100)), {}, "intermediate = 100 is not supported"),
        ((L1, L2), {"topk": 0}, "topk = 0 is not supported"),
    ):
        refused(lambda w=(w13, w2), more=wrong: mm.MegaMoE(*w, **{**sizes, **more}), says)
    monkeypatch.setattr(_workspace, "get_symm_buffer_for_mega_moe", lambda *_, **__: buffer)
    destroyed = []
    monkeypatch.setattr(buffer, "destroy", lambda: destroyed.append(True))
    refused(lambda: mm.MegaMoE((L1[0], L1[1].half()), L2, **sizes), "scales has dtype torch.float16")
    assert destroyed == [True], "a buffer without a layer keeps no memory"
    layer = mm.MegaMoE(L1, L2, **sizes)
    right = {"x": torch.zeros(3, 256), "topk_idx": torch.zeros(3, 2).long(), "topk_weights": torch.zeros(3, 2)}
    for wrong, says in (
        ({"x": [[1.0]]}, "x: list given; allowed: a torch.Tensor"),
        ({"x": torch.tensor(1.0)}, "x has shape (); allowed: [tokens, 256]"),
        ({"x": torch.zeros(3, 128)}, "x has shape (3, 128); allowed: (3, 256)"),
        ({"topk_idx": [[0, 1]]}, "topk_idx: list given"),
        ({"topk_idx": right["topk_idx"][:1]}, "topk_idx has shape (1, 2); allowed: (3, 2)"),
        ({"topk_weights": None}, "topk_weights: NoneType given"),
        ({"topk_weights": torch.zeros(3, 1)}, "topk_weights has shape (3, 1); allowed: (3, 2)"),
        ({"topk_idx": right["topk_weights"]}, "topk_idx has dtype torch.float32; allowed: int64 or int32"),
        ({"topk_idx": right["topk_idx"].bool()}, "topk_idx has dtype torch.bool; allowed: int64 or int32"),
        ({"topk_weights": right["topk_idx"]}, "topk_weights has dtype torch.int64; allowed: bfloat16, float16 or"),
        ({"x": right["x"].to(torch.float8_e4m3fn)}, "x is float8_e4m3fn without x_scales; allowed: codes with"),
        ({"x": right["x"].to("meta")}, "x is on meta; allowed: cpu, where the layer is"),
        ({"topk_idx": right["topk_idx"].to("meta")}, "topk_idx is on meta; allowed: cpu"),
    ):
        refused(lambda w=wrong: layer(**{**right, **w}), says)
    assert layer(**right).shape == (3, 256)
    assert (len(cuda.stages), len(cuda.launches)) == (1, 1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_sms": "60"}, "num_sms = '60' is not supported; allowed: 1 to 132"),
        ({"num_sms": 60.0}, "num_sms = 60.0 is not supported"),
        ({"num_sms": True}, "num_sms = True is not supported"),
        ({"variant": ["pingpong"]}, "variant = ['pingpong'], fast_math"),
    ],
)
def test_what_a_plan_is_made_of(buffer: SymmBuffer, wrong: dict[str, object], says: str):
    given = {"variant": None, "fast_math": True, "num_sms": None, **wrong}
    refused(lambda: buffer.plan(3, **given), says)


def test_a_group_that_is_none():
    sizes = (4, 64, 2, 256, 128)
    refused(lambda: mm.get_symm_buffer_for_mega_moe("world", *sizes), "group: str given; allowed: None, or a process")
