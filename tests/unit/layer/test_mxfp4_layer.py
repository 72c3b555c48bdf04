"""Layers and calls whose weights are MXFP4: what reaches the kernel, what callers get back, and what is refused.

The kernel's part is done by the reference, on what it finds at the addresses that it is given.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._check.scenarios import make_weights
from megamoe_jit._device.params import Params
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._spec import FP8, FP8_E5M2, MXFP4, MoEShape, Variant
from megamoe_jit.reference import moe_reference, with_shared_experts
from tests.unit.layer.test_calls import HERE, Cuda, call, refused
from tests.unit.layer.test_moe import F32, at, inputs, quantise
from tests.unit.layer.test_moe import FP8 as E4M3

SHAPE = MoEShape(256, 128, 4, 2)
DRAWN, OTHER = (make_weights(SHAPE, "cpu", seed, MXFP4) for seed in (0, 1))
L1, L2 = mm.transform_weights_for_mega_moe_sm90(DRAWN.l1, DRAWN.l2)
IN_FP8 = make_weights(SHAPE, "cpu")
transform, inverse = mm.transform_weights_for_mega_moe_sm90, mm.inverse_transform_weights_for_mega_moe_sm90


def compute(params: Params, routed: int = 4, shared: int = 0) -> None:
    """What the kernel does."""
    tokens, base, experts = params.tokens, params.peers[0], routed + shared
    if params.raw_x:
        quantise(params)
    ids, weights = at(base + params.topk_ids, torch.int64, tokens, 2), at(base + params.topk_weights, F32, tokens, 2)
    x = at(base + params.x, E4M3, tokens, 256), at(base + params.x_scales, F32, tokens, 2)
    matrices = []
    for matrix, rows, depth in ((1, 256, 256), (2, 256, 128)):
        addresses = [getattr(params, f"weight{matrix}{part}") for part in ("", "_exponents", "_scales")]
        addresses[0] = getattr(params, f"packed{matrix}") or addresses[0]  # of a kernel that expands them
        parts = MXFP4.parts(rows, depth)
        matrices.append(
            tuple(at(a, part.dtype, experts, *part.shape) for a, part in zip(addresses, parts, strict=True))
        )
    mm.mark_transformed(*matrices)
    slots = with_shared_experts(ids, weights, routed, shared, shared_weight=params.shared_weight)
    y = moe_reference(*x, *slots, *inverse(*matrices), activation_clamp=params.clamp)
    at(params.y, torch.bfloat16, tokens, 256).copy_(y)


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda(monkeypatch)
    made.kernel = compute
    return made


@pytest.fixture
def buffer(cuda: Cuda) -> SymmBuffer:
    return SymmBuffer(SHAPE, 128, HERE)


def clones(drawn: Any = DRAWN) -> tuple[WeightTensors, WeightTensors]:
    first, second = (tuple(each.clone() for each in given) for given in (drawn.l1, drawn.l2))
    return first, second


def layer(**more: Any) -> mm.MegaMoE:
    return mm.MegaMoE(*clones(), **{"topk": 2, "max_tokens": 128, **more})


def expected(batch: tuple[torch.Tensor, ...], drawn: Any = DRAWN, clamp: float | None = None) -> torch.Tensor:
    x, ids, weights = batch
    return moe_reference(*mm.quantize_activations(x), ids, weights, drawn.l1, drawn.l2, activation_clamp=clamp)


def same(a: WeightTensors, b: WeightTensors) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


# -- the reference ------------------------------------------------------------------------------------------------


def test_the_reference_takes_the_values_of_the_definition():
    batch = inputs(20)
    as_fp8 = [mm.fp8_from_mxfp4(*given, dtype=torch.float8_e5m2) for given in (DRAWN.l1, DRAWN.l2)]
    x, ids, weights = batch
    assert torch.equal(expected(batch), moe_reference(*mm.quantize_activations(x), ids, weights, *as_fp8))
    refused(
        lambda: moe_reference(*mm.quantize_activations(x), ids, weights, L1, L2), "l1: 3 tensors given; allowed: codes"
    )
    plain = (L1[0], DRAWN.l1[1]), DRAWN.l2
    refused(
        lambda: moe_reference(*mm.quantize_activations(x), ids, weights, *plain), "l1 weights are transformed already"
    )


# -- calls --------------------------------------------------------------------------------------------------------


def test_a_call_takes_the_format_from_its_weights(cuda: Cuda, buffer: SymmBuffer):
    cuda.kernel = lambda params: None
    call(buffer, l1=L1, l2=L2)
    fp8 = transform(IN_FP8.l1, IN_FP8.l2)
    call(buffer, l1=fp8[0], l2=fp8[1])
    call(buffer, l1=L1, l2=L2)
    packed_first, plain, packed_again = cuda.launches
    assert [launch.spec.weights for launch in cuda.launches] == [MXFP4, FP8, MXFP4]
    assert packed_first.spec.variant in Variant.reading(MXFP4)
    for launch in (packed_first, packed_again):
        found = [getattr(launch.params, f"weight{n}{part}") for n in (1, 2) for part in ("", "_exponents", "_scales")]
        assert found == [each.data_ptr() for each in (*L1, *L2)]
    assert (plain.params.weight1_exponents, plain.params.weight2_exponents) == (0, 0)
    assert len(buffer.kernels.bound) == 2


def test_kernels_of_a_format_are_prepared_by_name(cuda: Cuda, buffer: SymmBuffer):
    buffer.prepare_all(weight_format="mxfp4")
    assert {kind[3] for kind in buffer.kernels.bound} == {MXFP4}
    before = len(buffer.kernels.bound)
    call(buffer, l1=L1, l2=L2)
    assert len(buffer.kernels.bound) == before
    refused(lambda: buffer.prepare("pingpong", weight_format="mxfp4"), "variant = 'pingpong'", "for weights in mxfp4")
    refused(lambda: buffer.prepare("pingpong", weight_format="int4"), "unknown weight format 'int4'; allowed: fp8")


def moved(given: WeightTensors, place: int, made: Any) -> WeightTensors:
    return tuple(made if i == place else each for i, each in enumerate(given))


REFUSALS: dict[str, tuple[Any, Any, str]] = {
    "no exponents": ((L1[0], L1[2]), L2, "l1: 2 tensors given; allowed: codes, exponents, scales, as the"),
    "as callers bring it": (DRAWN.l1, DRAWN.l2, "l1: 2 tensors given; allowed: codes, exponents, scales"),
    "one tensor": (L1[0], L2, "l1: Tensor given; allowed: a pair of tensors"),
    "four": ((*L1, L1[2]), L2, "l1: tuple of 4 given; allowed: a pair of tensors"),
    "no tensor": (moved(L1, 1, None), L2, "l1 exponents: NoneType given; allowed: a torch.Tensor"),
    "two formats": (L1, transform(IN_FP8.l1, IN_FP8.l2)[1], "l2: 2 tensors given; allowed: codes, exponents, scales"),
    "codes as int8": (
        moved(L1, 0, L1[0].view(torch.int8)),
        L2,
        "l1 weights has dtype torch.int8; allowed: torch.uint8",
    ),
    "codes of another type": (moved(L1, 0, L1[0].float()), L2, "l1: tuple of 3 given; allowed: a pair"),
    "e8m0 exponents": (
        moved(L1, 1, L1[1].view(torch.float8_e8m0fnu)),
        L2,
        "l1 exponents has dtype torch.float8_e8m0fnu",
    ),
    "too few exponents": (L1, moved(L2, 1, L2[1][:, :, :2]), "l2 exponents has shape (4, 256, 2); allowed"),
    "scales in bf16": (moved(L1, 2, L1[2].bfloat16()), L2, "l1 scales has dtype torch.bfloat16; allowed"),
    "fewer experts": (moved(L1, 2, L1[2][:3]), L2, "l1 scales has shape (3, 2, 2); allowed: (4, 2, 2)"),
    "exponents elsewhere": (moved(L1, 1, L1[1].to("meta")), L2, "l1 exponents is on meta; allowed: cpu"),
    "strided exponents": (moved(L1, 1, torch.stack((L1[1],) * 2, -1)[..., 0]), L2, "l1 exponents has strides"),
    "unmarked codes": (moved(L1, 0, L1[0].clone()), L2, "l1 weights are not marked as transformed"),
    "unmarked exponents": (L1, moved(L2, 1, L2[1].clone()), "l2 exponents are not marked as transformed"),
    "the other matrix": (L1, (L2[0], L2[1], L1[2]), "l2 scales has shape (4, 2, 2); allowed: (4, 2, 1)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_such_weights_is_one_clear_error(cuda: Cuda, buffer: SymmBuffer, case: str):
    l1, l2, says = REFUSALS[case]
    refused(lambda: call(buffer, l1=l1, l2=l2), says)
    assert cuda.launches == []


def test_misaligned_exponents_are_refused(buffer: SymmBuffer):
    memory = torch.empty(L1[1].numel() + 1, dtype=torch.uint8)
    exponents = memory[1:].view(L1[1].shape)
    refused(
        lambda: call(buffer, l1=moved(L1, 1, exponents), l2=L2), "l1 exponents starts at", "a multiple of 16, which a"
    )


def test_another_size_is_refused_when_it_is_transformed():
    codes, e8m0 = DRAWN.l1
    for l1, l2, says in (
        ((codes[..., :32], e8m0), DRAWN.l2, "allowed: N and K multiples of 128, which is 64 bytes of mxfp4"),
        ((codes, e8m0[..., :2]), DRAWN.l2, "l1 exponents have shape (4, 256, 2); allowed: (4, 256, 8), one per 1 x 32"),
        (
            (codes, e8m0.float()),
            DRAWN.l2,
            "l1 exponents are torch.float32; allowed: torch.float8_e8m0fnu or torch.uint8; w",
        ),
        (DRAWN.l1, IN_FP8.l2, "l2 weights are torch.float8_e4m3fn (fp8); allowed: mxfp4, as l1"),
        ((codes, e8m0, L1[2].half()), DRAWN.l2, "l1 scales are torch.float16; allowed: torch.float32"),
        ((codes, e8m0.to("meta")), DRAWN.l2, "l1 exponents: a tensor on meta given, which holds no values"),
        (L1, L2, "l1 weights are transformed already"),
        ((codes, L1[1], L1[2]), DRAWN.l2, "l1 exponents are transformed already"),
    ):
        refused(lambda l1=l1, l2=l2: transform(l1, l2), says)
    refused(lambda: inverse(DRAWN.l1, DRAWN.l2), "l1: 2 tensors given; allowed: codes, exponents and scales")
    refused(lambda: transform(DRAWN.l1, DRAWN.l2, rounding=True), "rounding = True is not supported; allowed: None, or")


# -- in place, by expert, marks -----------------------------------------------------------------------------------


def test_in_place_keeps_the_memory_of_codes_and_exponents():
    l1, l2 = clones()
    places = [each.data_ptr() for each in (*l1, *l2)]
    made = transform(l1, l2, inplace=True)
    assert [each.data_ptr() for pair in made for each in pair[:2]] == places
    assert same((*made[0], *made[1]), (*L1, *L2))
    back = inverse(*made, inplace=True)
    assert [each.data_ptr() for pair in back for each in pair] == places
    assert same((*back[0], *back[1]), (*DRAWN.l1, *DRAWN.l2))
    assert back[0][1].dtype is torch.float8_e8m0fnu
    assert not mm.is_transformed(*back)
    transform(*back)


def test_experts_come_one_by_one():
    l1, l2 = clones()
    for e in (2, 0, 3, 1):
        assert not mm.is_transformed(l1, l2)
        l1, l2 = transform(l1, l2, inplace=True, experts=[e])
    assert mm.is_transformed(l1, l2)
    assert same((*l1, *l2), (*L1, *L2))
    first = [inverse(l1, l2, experts=[1])]
    assert [len(matrix) for matrix in first[0]] == [3, 3]
    assert torch.equal(first[0][0][0][1], DRAWN.l1[0][1])
    refused(lambda: inverse(*first[0]), "l1 weights are not marked as transformed")
    one = transform(*[tuple(each[2] for each in given) for given in (DRAWN.l1, DRAWN.l2)])
    assert same((*one[0], *one[1]), tuple(each[2] for each in (*L1, *L2))), "a matrix without a dimension of experts"


def test_memory_that_is_shared_is_not_permuted_in_place():
    l1, l2 = clones()
    memory = torch.cat((l1[0].flatten(), l1[1].flatten()))
    codes = memory[: l1[0].numel()].view(l1[0].shape)
    overlapping = memory[l1[0].numel() - 1 : -1].view(l1[1].shape)
    says = "elements of l1 exponents are elements of l1 weights too; allowed with inplace=True"
    refused(lambda: transform((codes, overlapping), l2, inplace=True), says)
    wide = torch.stack((l1[1],) * 2, -1)[..., 0]
    refused(lambda: transform((l1[0], wide), l2, inplace=True), "l1 exponents have strides", "allowed in place")
    assert same(transform((l1[0], wide), l2)[0], L1)


def test_marks_know_the_format():
    metadata = mm.weights_metadata(L1, L2)
    assert metadata == {"megamoe_jit.layout": "megamoe-sm90-2-mxfp4-2"}
    copies = tuple(tuple(each.clone() for each in matrix) for matrix in (L1, L2))
    assert not mm.is_transformed(*copies)
    mm.mark_transformed(*copies, metadata=metadata)
    assert mm.is_transformed(*copies)
    for other in ("megamoe-sm90-2", "megamoe-sm90-2-mxfp4"):  # another format's, and that of codes in an older order
        refused(
            lambda other=other: mm.mark_transformed(*copies, metadata={"megamoe_jit.layout": other}),
            "allowed: 'megamoe-sm90-2-mxfp4-2'",
        )
    refused(
        lambda: mm.mark_transformed(DRAWN.l1, DRAWN.l2), "l1: 2 tensors given; allowed: codes, exponents and scales"
    )
    mm.mark_transformed(*(matrix[:2] for matrix in copies), transformed=False)
    assert not mm.is_transformed(*copies)


# -- the module ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "form",
    [(torch.uint8, torch.uint8), (torch.int8, torch.float8_e8m0fnu), (torch.float4_e2m1fn_x2, torch.float8_e8m0fnu)],
    ids=lambda form: str(form[0]).removeprefix("torch."),
)
def test_a_layer_of_mxfp4(cuda: Cuda, inplace: bool, form: tuple[torch.dtype, torch.dtype]):
    l1, l2 = (tuple(each.view(kind) for each, kind in zip(given, form, strict=True)) for given in clones())
    it = mm.MegaMoE(l1, l2, topk=2, max_tokens=128, clamp=2.0, inplace=inplace, weight_format="mxfp4")
    assert it.weight_format == "mxfp4"
    assert ", weight_format=mxfp4" in repr(it)
    for tokens in (3, 300):
        batch = inputs(tokens)
        assert torch.equal(it(*batch), expected(batch, clamp=2.0))
    assert {launch.spec.weights for launch in cuda.launches} == {MXFP4}
    kept = [each.data_ptr() for each in (*l1, *l2)]
    assert ([each.data_ptr() for held in (it.l1, it.l2) for each in held[:2]] == kept) == inplace
    assert same(l1, DRAWN.l1) != inplace
    held = {name.removeprefix("module."): tensor for name, tensor in it.named_buffers()}
    assert list(held) == [f"l{n}_{part}" for n in (1, 2) for part in ("codes", "exponents", "scales")]
    assert sum(each.numel() for name, each in held.items() if "scales" not in name) * 8 == 4 * 3 * 256 * 128 * 4.25


def test_a_state_dict_has_what_was_given():
    it, file = layer(), io.BytesIO()
    torch.save(it.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert list(state) == ["w13", "w13_exponents", "w2", "w2_exponents"]
    assert same(tuple(state.values()), (*DRAWN.l1, *DRAWN.l2))
    assert [each.dtype for each in state.values()] == [torch.uint8, torch.float8_e8m0fnu] * 2
    other = mm.MegaMoE(*clones(OTHER), topk=2, max_tokens=128)
    places = [each.data_ptr() for each in (*other.l1, *other.l2)]
    other.load_state_dict(state)
    assert [each.data_ptr() for each in (*other.l1, *other.l2)] == places
    batch = inputs(5)
    assert torch.equal(other(*batch), expected(batch))
    without = {name: each for name, each in state.items() if name != "w2_exponents"}
    with pytest.raises(RuntimeError, match='While loading "w2": w2 exponents: NoneType given; allowed: a torch.Tensor'):
        other.load_state_dict(without)


def test_weights_are_loaded_in_place_or_not_at_all():
    it, batch = layer(), inputs(5)
    it.load_weights(OTHER.l1, OTHER.l2)
    assert torch.equal(it(*batch), expected(batch, OTHER))
    before = [each.clone() for each in (*it.l1, *it.l2)]
    wide = OTHER.l2[0].clone(), OTHER.l2[1].clone()
    wide[1][3, 0, 0] = 200
    for l1, l2, says in (
        (DRAWN.l1, wide, ("w2: 1 of 8 blocks of 128 x 128 are not exact", "expert 3, rows 0 to 127")),
        (DRAWN.l1, (wide[0], torch.full_like(wide[1], 255)), "w2 exponents[0, 0, 0] is 255, which is NaN"),
        (DRAWN.l1, IN_FP8.l2, "w2 codes are torch.float8_e4m3fn, which a layer holds in fp8; allowed: what"),
        (DRAWN.l1, torch.zeros(4, 256, 128), "w2 values are torch.float32, which a layer holds in fp8"),
        (DRAWN.l1, (wide[0], wide[1].float()), "w2 exponents are torch.float32"),
        (
            DRAWN.l1,
            (wide[0], wide[1][:, :, :2]),
            "w2 exponents are torch.uint8 (4, 256, 2); allowed: torch.uint8 (4, 256, 4)",
        ),
        (DRAWN.l1, (L2[0], wide[1]), "w2 weights are transformed already"),
    ):
        refused(lambda l1=l1, l2=l2: it.load_weights(l1, l2), *((says,) if isinstance(says, str) else says))
        assert same(tuple(before), (*it.l1, *it.l2))


def test_a_layer_rounds_when_asked_to():
    l1, l2 = clones()
    l2[0][1, 0, :16], l2[1][1, 0, 0] = 0x77, 150
    refused(lambda: mm.MegaMoE(l1, l2, topk=2, max_tokens=128), "l2 weights: 1 of 8 blocks", "expert 1,")
    it = mm.MegaMoE(l1, l2, topk=2, max_tokens=128, rounding="nearest")
    state = it.state_dict()
    assert same((state["w2"][0],), (l2[0][0],))
    it.load_weights(l1, l2)
    assert same(tuple(it.state_dict().values()), tuple(state.values()))
    it.load_weights(DRAWN.l1, DRAWN.l2)
    assert same(tuple(it.state_dict().values()), (*DRAWN.l1, *DRAWN.l2))


def test_the_format_of_a_layer_is_named_to_be_sure():
    for given, name in (((IN_FP8.l1, IN_FP8.l2), "mxfp4"), (clones(), "fp8"), (clones(), "fp8e5m2")):
        says = "which a layer holds in", f"allowed: what it holds in {name}"
        refused(lambda g=given, n=name: mm.MegaMoE(*g, topk=2, max_tokens=128, weight_format=n), *says)
    refused(lambda: layer(weight_format="fp8"), "fp8_from_mxfp4 makes FP8 weights of MXFP4 ones")
    refused(lambda: layer(weight_format="nvfp4"), "unknown weight format 'nvfp4'; allowed: fp8, fp8e5m2, mxfp4")
    refused(lambda: mm.MegaMoE(DRAWN.l1, IN_FP8.l2, topk=2, max_tokens=128), "w2 codes are torch.float8_e4m3fn")
    refused(lambda: mm.MegaMoE(DRAWN.l1, (DRAWN.l2[0][..., :32], DRAWN.l2[1]), topk=2, max_tokens=128), "w2 has shape")
    assert mm.MegaMoE(IN_FP8.l1, IN_FP8.l2, topk=2, max_tokens=128, weight_format="fp8").weight_format == "fp8"


def test_copies_and_exchanged_weights():
    it, batch = layer(), inputs(5)
    other = copy.deepcopy(it)
    other.load_weights(OTHER.l1, OTHER.l2)
    assert torch.equal(other(*batch), expected(batch, OTHER))
    assert torch.equal(it(*batch), expected(batch))
    held = dict(other.named_buffers())
    assert torch.equal(torch.func.functional_call(it, held, batch), expected(batch, OTHER))
    assert it.half().l1[2].dtype is torch.float32


def test_shared_experts_in_another_format_are_refused_with_the_next_step(cuda: Cuda):
    """DeepSeek-V4's, which are in FP8."""
    routed = make_weights(MoEShape(256, 128, 4, 2), "cpu", 0, MXFP4)
    shared = make_weights(MoEShape(256, 128, 1, 1), "cpu")
    with pytest.raises(mm.ConfigError, match="fp8_from_mxfp4 makes FP8.*; or shared experts run beside"):
        mm.MegaMoE(routed.l1, routed.l2, topk=2, max_tokens=128, shared_w13=shared.l1, shared_w2=shared.l2)


def test_shared_experts_are_in_the_same_format(cuda: Cuda):
    shape = MoEShape(256, 128, 4, 2, shared=2)
    drawn = make_weights(shape, "cpu", 0, MXFP4)
    cuda.kernel = lambda params: compute(params, 4, 2)
    routed, apart = (
        [tuple(each[which].clone() for each in given) for given in (drawn.l1, drawn.l2)]
        for which in (slice(4), slice(4, None))
    )
    batch = x, ids, weights = inputs(20)
    slots = with_shared_experts(ids, weights, 4, 2, shared_weight=0.5)
    wanted = moe_reference(*mm.quantize_activations(x), *slots, drawn.l1, drawn.l2)
    options: dict[str, Any] = {"topk": 2, "max_tokens": 128, "shared_weight": 0.5}
    come_apart = mm.MegaMoE(*routed, shared_w13=apart[0], shared_w2=apart[1], **options)
    together = mm.MegaMoE(drawn.l1, drawn.l2, num_shared_experts=2, **options)
    for it in (come_apart, together):
        assert torch.equal(it(*batch), wanted)
    state = come_apart.state_dict()
    assert list(state) == [f"{s}{m}{p}" for s in ("", "shared_") for m in ("w13", "w2") for p in ("", "_exponents")]
    assert same(tuple(state.values()), (*routed[0], *routed[1], *apart[0], *apart[1]))
    in_fp8 = [mm.fp8_from_mxfp4(*given) for given in apart]
    says = "shared_w13 codes are torch.float8_e4m3fn, which a layer holds in fp8; allowed: what it holds in mxfp4"
    refused(lambda: mm.MegaMoE(*routed, shared_w13=in_fp8[0], shared_w2=in_fp8[1], **options), says)


def test_a_layer_of_fp8_that_was_mxfp4_has_its_values(cuda: Cuda):
    cuda.kernel = lambda params: None
    in_fp8 = [mm.fp8_from_mxfp4(*given) for given in (DRAWN.l1, DRAWN.l2)]
    it = mm.MegaMoE(*in_fp8, topk=2, max_tokens=128)
    state = it.state_dict()
    values = mm.dequantize_weights(state["w13"], state["w13_scales"])
    assert torch.equal(values, MXFP4.dequantize(*DRAWN.l1))
    wide = make_weights(SHAPE, "cpu", 0, FP8_E5M2)
    assert torch.equal(FP8_E5M2.dequantize(*wide.l1), values), "whatever the format, scenarios have the same weights"
    assert it.weight_format == "fp8"


# -- operators ----------------------------------------------------------------------------------------------------


def test_tracers_see_the_operator_with_exponents(monkeypatch: pytest.MonkeyPatch):
    it, batch = layer(clamp=0.5), inputs(5)
    y = it(*batch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # tracers ask for CUDA's random state
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(it, fullgraph=True, backend="aot_eager")(*batch), y)
    torch._dynamo.reset()
    arguments = it.l1[0], it.l1[2], it.l2[0], it.l2[2]
    exponents = {"l1_exponents": it.l1[1], "l2_exponents": it.l2[1]}
    op, quick = torch.ops.megamoe_jit, ("test_schema", "test_faketensor")
    given = (*batch, *arguments, it._workspace)
    found = torch.library.opcheck(op.moe.default, given, {"clamp": 0.5, **exponents}, test_utils=quick)
    assert set(found.values()) == {"SUCCESS"}
    into, copies = torch.empty_like(y), [each.clone() for each in arguments]
    op.moe_into(into, *batch, *copies, it._workspace, 0.5, **{name: each.clone() for name, each in exponents.items()})
    assert torch.equal(into, y), "copies have no mark, and the name of the workspace says the order"


def test_what_is_drawn_is_e2m1_to_nearest():
    """The weights of scenarios are what a quantiser makes of values, all codes among them."""
    codes = torch.cat([each.flatten() for each in (DRAWN.l1[0], DRAWN.l2[0])])
    assert set((codes & 15).tolist()) == set(range(16))
    spreads = [mm.mxfp4_spread(*given) for given in (DRAWN.l1, DRAWN.l2)]
    assert all(set(each.exact.values()) == {each.blocks} for each in spreads)
    assert max(each.binades for each in spreads) > 12
    first = (MXFP4.dequantize(*DRAWN.l1)[0] - mm.dequantize_weights(*IN_FP8.l1)[0]).abs()
    assert float(first.median()) < 0.01, "0.05 times normal, as those of FP8"
