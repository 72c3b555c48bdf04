"""A layer as a module of torch: state dicts, moves and casts, copies, and weights that are loaded in place."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import megamoe_jit as mm
from megamoe_jit._layer.given_weights import WeightTensors
from tests.unit.layer.test_calls import DRAWN, Cuda, refused, uses
from tests.unit.layer.test_moe import compute, cuda, expected, inputs, layer, same  # noqa: F401

pytestmark = pytest.mark.usefixtures("cuda")

KEYS = ["w13", "w13_scales", "w2", "w2_scales"]
GEN = torch.Generator().manual_seed(3)
OTHER = torch.randn(4, 256, 256, generator=GEN) * 0.05, torch.randn(4, 256, 128, generator=GEN) * 0.05
STRAY = torch.zeros(1)
QUANTISED = tuple(mm.quantize_weights(each) for each in OTHER)


class Model(torch.nn.Module):
    """A layer behind something that torch knows."""

    def __init__(self, **more: object) -> None:
        super().__init__()
        self.norm = torch.nn.Linear(256, 256)
        self.experts = layer(**more)
        self.experts.register_buffer("seen", torch.zeros(4))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.experts(self.norm(x.to(self.norm.weight.dtype)).bfloat16(), ids, weights)


def held(it: mm.MegaMoE) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in (*it.l1, *it.l2)]


def unchanged(it: mm.MegaMoE, before: list[torch.Tensor], addresses: list[int]) -> bool:
    now = [*it.l1, *it.l2]
    return [t.data_ptr() for t in now] == addresses and all(
        a.dtype == b.dtype and same(a, b) for a, b in zip(now, before, strict=True)
    )


def places(it: mm.MegaMoE) -> list[int]:
    return [tensor.data_ptr() for tensor in (*it.l1, *it.l2)]


def ordered(l1: WeightTensors, l2: WeightTensors) -> list[torch.Tensor]:
    """As the kernel reads them."""
    w13, w2 = mm.transform_weights_for_mega_moe_sm90(l1, l2)
    return [*w13, *w2]


# -- moves and casts ----------------------------------------------------------------------------------------------


HARMLESS: dict[str, Callable[[torch.nn.Module], object]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float16),
    "to dtype": lambda m: m.to(torch.bfloat16),
    "to both": lambda m: m.to("cpu", torch.bfloat16),
    "to the same device": lambda m: m.to("cpu"),
    "cpu": lambda m: m.cpu(),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "eval": lambda m: m.eval(),
    "train": lambda m: m.train(),
    "requires_grad_": lambda m: m.requires_grad_(True),
    "no requires_grad_": lambda m: m.requires_grad_(False),
    "share_memory": lambda m: m.share_memory(),
    "apply": lambda m: m.apply(lambda each: [p.data.fill_(0.5) for p in each.parameters(recurse=False)]),
    "zero_grad": lambda m: m.zero_grad(),
}


@pytest.mark.parametrize("how", HARMLESS)
def test_what_models_do_to_their_modules_leaves_a_layer_as_it_is(cuda: Cuda, how: str):  # noqa: F811
    model = Model()
    before, addresses, names = held(model.experts), places(model.experts), list(dict(model.named_buffers()))
    HARMLESS[how](model)
    assert unchanged(model.experts, before, addresses)
    assert sorted(dict(model.named_buffers())) == sorted(names)
    assert not any(tensor.requires_grad for tensor in (*model.experts.l1, *model.experts.l2))
    assert model.experts.seen.dtype == model.norm.weight.dtype, "what others registered is theirs to cast"
    model(*inputs(3))
    assert len(cuda.launches) == 1


@pytest.mark.parametrize("how", [lambda m: m.to("meta"), lambda m: m.to_empty(device="meta")])
def test_a_layer_is_not_moved(how: Callable):
    it = layer()
    before, addresses = held(it), places(it)
    for module in (it, torch.nn.Sequential(it)):
        refused(lambda m=module: how(m), "cannot be moved from cpu to meta", "by address; allowed: cpu", "state_dict()")
    assert unchanged(it, before, addresses)
    it(*inputs(3))


def test_a_layer_is_a_module_that_says_what_it_is():
    model = torch.nn.Sequential(layer(clamp=2.5))
    assert isinstance(model[0], torch.nn.Module)
    assert list(model.parameters()) == []
    assert [name for name, _ in model.named_buffers()] == ["0.l1_codes", "0.l1_scales", "0.l2_codes", "0.l2_scales"]
    says = "(0): MegaMoE(experts=4, hidden=256, intermediate=128, topk=2, capacity=128, clamp=2.5, fast_math=True, "
    assert f"{says}device=cpu, workspace=shared)" in repr(model)
    model[0].destroy()
    assert says in repr(model)


def test_hooks_and_keywords_are_those_of_any_module():
    it, (x, ids, weights), seen = layer(), inputs(3), []
    it.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    it(x, topk_weights=weights, topk_idx=ids)
    assert seen == [(3, 256)]


def test_functional_call_exchanges_the_weights(cuda: Cuda):  # noqa: F811
    cuda.kernel = compute
    it, given = layer(), inputs(5)
    other = dict(zip(("l1_codes", "l1_scales", "l2_codes", "l2_scales"), ordered(*QUANTISED), strict=True))
    assert torch.equal(torch.func.functional_call(it, other, given), layer_of(*QUANTISED)(*given))
    assert torch.equal(it(*given), expected(*given, None))
    plain = {"l1_codes": QUANTISED[0][0]}
    refused(lambda: torch.func.functional_call(it, plain, given), "l1 weights are not marked as transformed")


def layer_of(w13: object, w2: object) -> mm.MegaMoE:
    return mm.MegaMoE(w13, w2, topk=2, max_tokens=128)


def test_a_model_is_copied(cuda: Cuda):  # noqa: F811
    cuda.kernel = compute
    model, given = Model(), inputs(3)
    other = copy.deepcopy(model)
    assert torch.equal(other(*given), model(*given))
    assert set(places(other.experts)).isdisjoint(places(model.experts))
    assert other.experts.seen.data_ptr() != model.experts.seen.data_ptr()
    other.experts.load_weights(*OTHER)
    assert not torch.equal(other(*given), model(*given))


def test_a_layer_is_not_pickled_and_says_what_is():
    for save in (pickle.dumps, lambda it: torch.save(it, io.BytesIO())):
        refused(lambda s=save: s(layer()), "cannot be sent; allowed: the layer's state_dict()")


# -- state dicts --------------------------------------------------------------------------------------------------


def test_a_state_dict_is_plain_and_comes_back(cuda: Cuda):  # noqa: F811
    cuda.kernel = compute
    model, given = Model(), inputs(5)
    state = model.state_dict()
    assert [name for name in state if name.startswith("experts.w")] == [f"experts.{key}" for key in KEYS]
    for key, drawn in zip(KEYS, (*DRAWN.l1, *DRAWN.l2), strict=True):
        tensor = state[f"experts.{key}"]
        assert (tensor.dtype, tensor.device.type, tensor.is_contiguous()) == (drawn.dtype, "cpu", True)
        assert same(tensor, drawn)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = Model()
    other.experts.load_weights(*OTHER)
    addresses = places(other.experts)
    assert not torch.equal(other(*given), model(*given))
    assert str(other.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
    assert torch.equal(other(*given), model(*given))
    assert places(other.experts) == addresses
    assert mm.is_transformed(other.experts.l1, other.experts.l2)


def test_a_state_dict_is_a_copy_that_later_weights_do_not_change():
    it = layer()
    state = it.state_dict()
    it.load_weights(*OTHER)
    assert all(same(state[key], drawn) for key, drawn in zip(KEYS, (*DRAWN.l1, *DRAWN.l2), strict=True))


def test_values_without_scales_are_quantised():
    it, other = layer(), layer()
    it.load_state_dict({"w13": OTHER[0], "w2": OTHER[1]})
    other.load_weights(*OTHER)
    assert all(same(a, b) for a, b in zip(held(it), held(other), strict=True))


def test_assigning_writes_too_since_the_order_in_memory_is_another_one():
    it = layer()
    before, addresses = held(it), places(it)
    it.load_weights(*OTHER)
    it.load_state_dict(dict(zip(KEYS, (*DRAWN.l1, *DRAWN.l2), strict=True)), assign=True)
    assert unchanged(it, before, addresses)


def state(**changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    whole = dict(zip(KEYS, (*DRAWN.l1, *DRAWN.l2), strict=True)) | changed
    return {name: tensor for name, tensor in whole.items() if tensor is not None}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (state(w13=None, w13_scales=None), 'Missing key(s) in state_dict: "w13", "w13_scales"'),
        (state(w2=None), 'Missing key(s) in state_dict: "w2"'),
        (state(w2_scales=None), 'While loading "w2": w2 scales: NoneType given; allowed: a torch.Tensor'),
        (state(l1_codes=DRAWN.l1[0]), 'Unexpected key(s) in state_dict: "l1_codes"'),
        (state(extra=STRAY), 'Unexpected key(s) in state_dict: "extra"'),
        (state(w13=DRAWN.l1[0][:2]), "w13 has shape (2, 256, 256); allowed: (4, 256, 256), the layer's"),
        (state(w13_scales=DRAWN.l1[1][:, :1]), "w13 scales are torch.float32 (4, 1, 2); allowed: torch.float32 (4, 2"),
        (state(w2=DRAWN.l2[0].view(torch.uint8)), "w2 codes are torch.uint8"),
        (state(w2=ordered(DRAWN.l1, DRAWN.l2)[2]), "w2 weights are transformed already"),
        (state(w2=DRAWN.l2[0].to("meta")), "w2: a tensor on meta given"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_as_torch_does(given: dict[str, torch.Tensor], says: str):
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for MegaMoE") as caught:
        layer().load_state_dict(given)
    assert says in str(caught.value)


def test_what_is_missing_is_left_as_it_is_where_that_is_allowed():
    it = layer()
    before, other = held(it), ordered(*QUANTISED)
    found = it.load_state_dict({"w2": QUANTISED[1][0], "w2_scales": QUANTISED[1][1], "odd": STRAY}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["w13", "w13_scales"], ["odd"])
    assert all(same(a, b) for a, b in zip(held(it), [*before[:2], *other[2:]], strict=True))


# -- weights in place ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["values", "pairs", "mixed"])
def test_weights_are_loaded_where_they_are(cuda: Cuda, which: str):  # noqa: F811
    cuda.kernel = compute
    w13 = QUANTISED[0] if which == "pairs" else OTHER[0]
    w2 = OTHER[1] if which == "values" else QUANTISED[1]
    it, given = layer(), inputs(5)
    addresses = places(it)
    it(*given)
    it.load_weights(w13, w2)
    assert torch.equal(it(*given), layer_of(*OTHER)(*given))
    assert unchanged(it, ordered(*QUANTISED), addresses)


def test_loading_changes_nothing_that_the_caller_has():
    pairs = [tuple(tensor.clone() for tensor in pair) for pair in (DRAWN.l1, DRAWN.l2)]
    it, new = layer_of(*pairs), [tensor.clone() for pair in QUANTISED for tensor in pair]
    it.load_weights((new[0], new[1]), (new[2], new[3]))
    assert all(same(a, b) for a, b in zip([t for p in pairs for t in p], [*DRAWN.l1, *DRAWN.l2], strict=True))
    assert all(same(a, b) for a, b in zip(new, [tensor for pair in QUANTISED for tensor in pair], strict=True))


def test_no_more_than_an_expert_is_held_beside_the_weights(monkeypatch: pytest.MonkeyPatch):
    it, sizes = layer(), []
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: (sizes.append(t.numel()), real(t, *a, **k))[1])
    it.load_weights(*OTHER)
    assert max(sizes) == 256 * 256


@pytest.mark.parametrize(
    ("w13", "w2", "says"),
    [
        (None, OTHER[1], "w13: NoneType given; allowed: a pair of tensors"),
        (OTHER[0], OTHER[1][:, :128], "w2 has shape (4, 128, 128); allowed: (4, 256, 128), the layer's"),
        (OTHER[0].to(torch.int8), OTHER[1], "w13 has dtype torch.int8; allowed: bfloat16, float16 or float32"),
        (OTHER[0], tuple(ordered(*QUANTISED)[2:]), "w2 weights are transformed already"),
        (OTHER[0], (QUANTISED[1][0], QUANTISED[1][1].half()), "w2 scales are torch.float16"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_is_written(w13: object, w2: object, says: str):
    it = layer()
    before, addresses = held(it), places(it)
    refused(lambda: it.load_weights(w13, w2), says)
    assert unchanged(it, before, addresses)


@pytest.mark.parametrize("form", ["values", "pairs"])
def test_a_layer_is_not_made_of_tensors_without_values(form: str):
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(tensor) for tensor in OTHER]
        pairs = [tuple(mode.from_tensor(tensor) for tensor in pair) for pair in QUANTISED]
        weights = pairs if form == "pairs" else given
        refused(lambda: mm.MegaMoE(*weights, topk=2, max_tokens=128), "a FakeTensor given, which holds no values")
    it = layer()
    refused(lambda: it.load_weights(*weights), "a FakeTensor given, which holds no values")


def test_loading_waits_for_calls_on_other_streams_and_they_for_it(cuda: Cuda):  # noqa: F811
    it = layer()
    it(*inputs(3))
    cuda.events.clear()
    cuda.stream = cuda.b
    it.load_weights(*OTHER)
    assert cuda.events == [("wait", "B", "A"), *uses(it.buffer, "B")]
    cuda.stream = cuda.a
    it(*inputs(3))
    assert cuda.events[3] == ("wait", "A", "B")


def test_weights_are_neither_loaded_nor_read_nor_copied_in_a_capture(cuda: Cuda):  # noqa: F811
    it = layer()
    cuda.capturing = True
    refused(lambda: it.load_weights(*OTHER), "weights cannot be loaded while", kind=mm.CaptureError)
    refused(it.state_dict, "weights cannot be read while", kind=mm.CaptureError)
    refused(lambda: copy.deepcopy(it), "a layer cannot be copied while", kind=mm.CaptureError)
    values = {"w13": OTHER[0], "w2": OTHER[1]}
    refused(lambda: it.load_state_dict(values), "weights cannot be loaded while", kind=mm.CaptureError)
