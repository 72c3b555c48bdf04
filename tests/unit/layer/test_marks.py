"""Marks of transformed weights: what keeps them, what loses them, and what is refused without or because of one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._layer import marks as _marks
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit.reference import moe_reference
from tests.unit.layer.test_calls import DRAWN, L1, L2, Cuda, buffer, call, cuda, refused  # noqa: F401
from tests.unit.layer.test_weights import make, same

transform, inverse = mm.transform_weights_for_mega_moe_sm90, mm.inverse_transform_weights_for_mega_moe_sm90
MARKED = f"{_marks.LAYOUT}/l1"
KEEP: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Parameter": lambda w: torch.nn.Parameter(w, requires_grad=False),
    "Parameter.data": lambda w: torch.nn.Parameter(w, requires_grad=False).data,
    "detach": lambda w: w.detach(),
    "bytes and back": lambda w: w.view(torch.uint8).view(torch.float8_e4m3fn),
    "contiguous": lambda w: w.contiguous(),
    "to where it is": lambda w: w.to("cpu"),
    "inference": lambda w: torch.nn.Buffer(w).detach(),
    "one expert after the other": lambda w: w[:1].as_strided(w.shape, w.stride()),
}
LOSE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "clone": torch.clone,
    "deepcopy": copy.deepcopy,
    "other memory as data": lambda w: torch.nn.Parameter(w, requires_grad=False).data.clone(),
    "a part is plain": lambda w: torch.cat([w.view(torch.uint8)[:3], w.view(torch.uint8)[3:]]).view(w.dtype),
}


def there(change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[tuple, tuple]:
    return tuple((change(codes), scales) for codes, scales in (L1, L2))


@pytest.mark.parametrize("how", KEEP)
def test_what_shares_the_memory_is_marked(cuda: Cuda, buffer: SymmBuffer, how: str):  # noqa: F811
    l1, l2 = there(KEEP[how])
    assert mm.is_transformed(l1, l2)
    call(buffer, l1=l1, l2=l2)
    assert len(cuda.launches) == 1


@pytest.mark.parametrize("how", LOSE)
def test_other_memory_is_not_and_somebody_must_say_so(cuda: Cuda, buffer: SymmBuffer, how: str):  # noqa: F811
    l1, l2 = there(LOSE[how])
    assert not mm.is_transformed(l1, l2)
    refused(
        lambda: call(buffer, l1=l1, l2=l2),
        f"l1 weights are not marked as transformed; allowed: {MARKED}",
        "mark_transformed(l1_weights, l2_weights)",
    )
    assert cuda.launches == []
    mm.mark_transformed(l1, l2)
    call(buffer, l1=l1, l2=l2)
    assert len(cuda.launches) == 1


def test_plain_weights_are_never_launched_with(cuda: Cuda, buffer: SymmBuffer):  # noqa: F811
    refused(lambda: call(buffer, l1=DRAWN.l1, l2=DRAWN.l2), "l1 weights are not marked as transformed")
    refused(lambda: call(buffer, l2=DRAWN.l2), "l2 weights are not marked as transformed")
    back = inverse(*transform(DRAWN.l1, DRAWN.l2))
    refused(lambda: call(buffer, l1=back[0], l2=back[1]), "l1 weights are not marked")
    assert cuda.launches == []


def test_a_mark_is_looked_at_once_for_each_set_of_tensors(cuda: Cuda, buffer: SymmBuffer, monkeypatch):  # noqa: F811
    looked = []
    real = _marks.order_of
    monkeypatch.setattr(_marks, "order_of", lambda *given: looked.append(given) or real(*given))
    for _ in range(3):
        call(buffer)
    assert len(looked) == 2
    call(buffer, l1=(L1[0].detach(), L1[1]))
    assert len(looked) == 4


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_is_transformed_twice_or_back_without_having_been(inplace: bool):
    given = make()
    refused(lambda: inverse(*given, inplace=inplace), "l1 weights are not marked as transformed")
    made = transform(*given, inplace=inplace)
    before = made[0][0].clone()
    refused(lambda: transform(*made, inplace=inplace), f"l1 weights are transformed already ({MARKED})")
    assert same(made[0][0], before)
    inverse(*made, inplace=inplace)
    if inplace:
        transform(*given, inplace=True)  # plain again
    assert same(made[0][0], before)


@pytest.mark.parametrize("inplace", [False, True])
def test_each_expert_has_its_own_state(inplace: bool):
    made = transform(*make(experts=4), inplace=inplace, experts=[3, 1])
    assert not mm.is_transformed(*made)
    refused(lambda: mm.weights_metadata(*made), "l1 weights are not marked")
    of = lambda *experts: tuple((codes[list(experts)[0] : experts[-1] + 1], sf[: len(experts)]) for codes, sf in made)  # noqa: E731
    assert [mm.is_transformed(*of(e)) for e in range(4)] == [False, True, False, True]
    with pytest.raises(mm.ConfigError, match="l1 weights are in the kernel's order only in part"):
        _marks.require_marked("l1", made[0][0][:2])
    refused(lambda: transform(*made, inplace=inplace), "l1 weights are transformed already")
    refused(lambda: inverse(*made, inplace=inplace), "l1 weights are not marked as transformed")
    whole = transform(*made, inplace=inplace, experts=[0, 2])
    assert mm.is_transformed(*whole)
    back = inverse(*whole, inplace=inplace, experts=[2])
    assert [mm.is_transformed(*((c[e], sf[e]) for c, sf in back)) for e in range(4)] == [True, True, False, True]


def test_experts_copied_over_each_other_stay_marked():
    (w13, sf1), (w2, sf2) = transform(*make(experts=4), inplace=True)
    for codes in (w13, w2):
        codes[0].copy_(codes[2])
    assert mm.is_transformed((w13, sf1), (w2, sf2))
    assert mm.is_transformed((w13[1:3], sf1[1:3]), (w2[1:3], sf2[1:3]))


def test_weights_loaded_again_into_the_same_memory():
    given, again = make(seed=1), make(seed=2)
    transform(*given, inplace=True)
    for (codes, _), (new, _) in zip(given, again, strict=True):
        codes.copy_(new)
    refused(lambda: transform(*given, inplace=True), "mark_transformed(..., transformed=False)")
    mm.mark_transformed(*given, transformed=False)
    assert all(same(a[0], b[0]) for a, b in zip(transform(*given, inplace=True), transform(*again), strict=True))


def test_tensors_of_one_storage_are_told_apart():
    """All weights of a model in one tensor: l1, l2 and others, marked each where it lies."""
    l1, l2 = make(experts=2)
    size = [w.numel() for w in (l1[0], l2[0])]
    flat = torch.zeros(2 * sum(size), dtype=torch.uint8)
    parts = [part.view(torch.float8_e4m3fn) for part in flat.split([*size, *size])]
    codes = [part.view(w[0].shape) for part, w in zip(parts, (l1, l2, l1, l2), strict=True)]
    first, second = [((codes[i], l1[1]), (codes[i + 1], l2[1])) for i in (0, 2)]
    transform(*first, inplace=True)
    assert (mm.is_transformed(*first), mm.is_transformed(*second)) == (True, False)
    transform(*second, inplace=True)
    assert mm.is_transformed(*second)
    inverse(*first, inplace=True)
    assert (mm.is_transformed(*first), mm.is_transformed(*second)) == (False, True)


def test_a_mark_ends_with_the_memory():
    made = transform(*make())
    for codes in (made[0][0], made[1][0]):
        assert _marks.order_of(codes, (0, 1)) is not None
    address, storage = made[0][0].data_ptr(), made[0][0].untyped_storage()
    attribute = vars(storage)
    del made, codes, storage
    gc.collect()
    again = torch.empty(3 * 512 * 128, dtype=torch.uint8)  # likely, not surely, where the weights were
    assert attribute, "it was there, and belongs to nothing now"
    assert _marks.order_of(again, (0, 1)) is None, address


def test_another_versions_order_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    made = transform(*make())
    monkeypatch.setattr(_marks, "LAYOUT", "megamoe-sm90-3")
    refused(
        lambda: _marks.require_marked("l1", made[0][0]), "are in the order megamoe-sm90-2/l1; allowed: megamoe-sm90-3"
    )
    refused(lambda: _marks.require_marked("l2", made[0][0]), "are in the order megamoe-sm90-2/l1")


def test_a_file_says_which_order_it_has():
    l1, l2 = transform(*make())
    metadata = mm.weights_metadata(l1, l2)
    assert metadata == {"megamoe_jit.layout": "megamoe-sm90-2"}
    loaded = [(codes.clone(), scales.clone()) for codes, scales in (l1, l2)]
    for other in ({}, {"format": "pt"}, {"megamoe_jit.layout": "megamoe-sm90-1"}, {"megamoe_jit.layout": None}, "x"):
        refused(lambda m=other: mm.mark_transformed(*loaded, metadata=m), "metadata: megamoe_jit.layout is ")
    assert not mm.is_transformed(*loaded)
    mm.mark_transformed(*loaded, metadata={"format": "pt", **metadata})
    assert mm.is_transformed(*loaded)


def test_safetensors_round_trip(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    l1, l2 = transform(*make())
    names = {"w13": l1[0], "sf1": l1[1], "w2": l2[0], "sf2": l2[1]}
    save_file(names, tmp_path / "w.safetensors", metadata=mm.weights_metadata(l1, l2))
    with safetensors.safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        read = {name: file.get_tensor(name) for name in names}
        pairs = (read["w13"], read["sf1"]), (read["w2"], read["sf2"])
        assert not mm.is_transformed(*pairs)
        mm.mark_transformed(*pairs, metadata=file.metadata())
    assert all(same(a[0], b[0]) for a, b in zip(inverse(*pairs), inverse(l1, l2), strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_takes_what_is_transformed_as_it_is(cuda: Cuda, inplace: bool):  # noqa: F811
    layer = mm.MegaMoE(L1, L2, topk=2, max_tokens=128, inplace=inplace)
    assert same(layer.l1[0], L1[0])
    assert same(layer.l2[0], L2[0])
    assert (layer.l1[0].data_ptr() == L1[0].data_ptr()) == inplace
    assert mm.is_transformed(layer.l1, layer.l2)
    plain = mm.inverse_transform_weights_for_mega_moe_sm90(L1, L2)
    refused(lambda: mm.MegaMoE(L1, plain[1], topk=2, max_tokens=128), "w13 weights are transformed already")
    refused(
        lambda: mm.MegaMoE(L1, L2, shared_w13=plain[0], shared_w2=plain[1], topk=2, max_tokens=128),
        "in the kernel's order already",
    )


def test_reference_takes_plain_weights_alone():
    x, sf = mm.quantize_activations(torch.ones(3, 256))
    ids, weights = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    refused(lambda: moe_reference(x, sf, ids, weights, L1, L2), "l1 weights are transformed already")


OVERLAPS = {
    "rows of an expert": lambda b: b[:512].as_strided((3, 512, 128), (65536, 64, 1)),
    "experts": lambda b: b.as_strided((3, 512, 128), (32768, 128, 1)),
    "one expert": lambda b: b.as_strided((3, 512, 128), (0, 128, 1)),
}


@pytest.mark.parametrize("how", OVERLAPS)
def test_codes_that_overlap_are_not_written_over(how: str):
    l1, l2 = make()
    memory = torch.randint(0, 100, (1 << 20,), dtype=torch.uint8)
    before = memory.clone()
    codes = OVERLAPS[how](memory).view(torch.float8_e4m3fn)
    refused(lambda: transform((codes, l1[1]), l2, inplace=True), "l1 weights", "in")
    assert torch.equal(memory, before)
    transform((codes, l1[1]), l2)


@pytest.mark.parametrize("which", ["l1 and l2", "codes and scales"])
def test_matrices_that_share_memory_are_not_written_over(which: str):
    l1, l2 = make()
    memory = torch.randint(0, 100, (1 << 20,), dtype=torch.uint8)
    before = memory.clone()
    w13 = memory[: 3 * 512 * 128].view(torch.float8_e4m3fn).view(3, 512, 128)
    w2, sf2 = l2
    if which == "l1 and l2":
        w2 = memory[3 * 512 * 128 - 16 :][: w2.numel()].view(torch.float8_e4m3fn).view(w2.shape)
    else:
        sf2 = memory[1024 : 1024 + 4 * sf2.numel()].view(torch.float32).view(sf2.shape)
    given = ((w13, l1[1]), (w2, sf2))
    refused(lambda: transform(*given, inplace=True), "elements of", "allowed with inplace=True")
    assert torch.equal(memory, before)
    transform(*given)


@pytest.mark.parametrize("workspace", ["shared", "own"])
def test_a_layer_is_copied_with_weights_of_its_own_and_a_buffer_if_it_has_one(cuda: Cuda, workspace: str):  # noqa: F811
    layer = mm.MegaMoE(DRAWN.l1, DRAWN.l2, topk=2, max_tokens=128, clamp=2.5, workspace=workspace)
    layer.note = ["mine"]
    made = copy.deepcopy({"one": layer, "same": layer})
    other = made["one"]
    assert made["same"] is other
    assert type(other) is mm.MegaMoE
    assert (other.clamp, other.fast_math, other.note) == (2.5, True, ["mine"])
    assert other.note is not layer.note
    assert (other.buffer is layer.buffer) == (workspace == "shared")
    assert other.buffer.shape == layer.buffer.shape
    for ours, theirs in zip((*layer.l1, *layer.l2), (*other.l1, *other.l2), strict=True):
        assert same(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    layer.destroy()
    other(torch.zeros(3, 256), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2))
    assert len(cuda.launches) == 1
    refused(lambda: copy.deepcopy(layer), f"this {'layer' if workspace == 'shared' else 'buffer'} was destroyed")
    refused(lambda: copy.deepcopy(other.buffer), "a SymmBuffer is memory", "allowed: get_symm_buffer_for_mega_moe(...)")
    refused(lambda: copy.copy(other.buffer), "a SymmBuffer is memory")
