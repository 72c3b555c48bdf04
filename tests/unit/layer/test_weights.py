"""The order in which the kernel reads weights, its inverse, in place and by expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe_jit._errors import CaptureError, ConfigError
from megamoe_jit._layer.weights import inverse_transform_weights_for_mega_moe_sm90 as inverse
from megamoe_jit._layer.weights import mark_transformed
from megamoe_jit._layer.weights import transform_weights_for_mega_moe_sm90 as transform

E4M3 = torch.float8_e4m3fn


def make(experts=3, hidden=128, intermediate=256, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def codes(*shape):
        return torch.randint(0, 127, shape, generator=gen, dtype=torch.uint8).view(E4M3)

    l1 = codes(experts, 2 * intermediate, hidden), torch.rand(experts, 2 * intermediate // 128, hidden // 128)
    l2 = codes(experts, hidden, intermediate), torch.rand(experts, hidden // 128, intermediate // 128)
    return l1, l2


def same(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def place(row, column, rows, depth):
    """Where bytes of one expert's matrix lie: tiles of 256 rows and 128 columns, chunks of 16 bytes swizzled."""
    tile, inside = row // 256 * 256, row % 256
    height = (rows - tile).clamp(max=256)
    block, chunk = column // 128, column % 128 // 16
    return tile * depth + block * height * 128 + inside * 128 + (chunk ^ row % 8) * 16 + column % 16


def gate_up_row(row, intermediate):
    """The row of gates, then ups, that is row `row` of the kernel's."""
    group, within = divmod(row, 16)
    return 8 * group + within if within < 8 else intermediate + 8 * group + within - 8


@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 256), (384, 128), (640, 384)])
def test_each_byte_is_where_the_kernel_reads_it(hidden, intermediate):
    l1, l2 = make(2, hidden, intermediate)
    (w13, sf1), (w2, sf2) = transform(l1, l2)
    for drawn, made, source in ((l1[0], w13, lambda row: gate_up_row(row, intermediate)), (l2[0], w2, lambda row: row)):
        rows, depth = drawn.shape[1:]
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(depth), indexing="ij")
        at = place(row, column, rows, depth).flatten()
        assert at.sort().values.equal(torch.arange(rows * depth))
        source_row = torch.tensor([source(r) for r in range(rows)])
        for expert in range(2):
            before = drawn[expert].view(torch.uint8)[source_row].flatten()
            assert torch.equal(made[expert].view(torch.uint8).flatten()[at], before)
        assert made.data_ptr() != drawn.data_ptr()
        assert made.shape == drawn.shape
    assert sf1 is l1[1]
    assert sf2 is l2[1]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_inverse_restores(experts, hidden, intermediate, inplace):
    l1, l2 = make(experts, 128 * hidden, 128 * intermediate)
    originals = l1[0].clone(), l2[0].clone()
    forth = transform(l1, l2, inplace=inplace)
    assert not any(same(pair[0], original) for pair, original in zip(forth, originals, strict=True))
    back = inverse(*forth, inplace=inplace)
    for original, drawn, restored in zip(originals, (l1, l2), back, strict=True):
        assert same(restored[0], original)
        assert same(drawn[0], original)


def test_inplace_writes_where_it_is_and_equals_the_copy():
    given = make()
    expected = transform(*given)
    made = transform(*given, inplace=True)
    for (codes, _), (copied, _), (there, _) in zip(given, expected, made, strict=True):
        assert there.data_ptr() == codes.data_ptr()
        assert same(there, copied)


@pytest.mark.parametrize("intermediate", [128, 256])  # matrices of one tile and k-block, and of more
def test_rows_that_do_not_follow_each_other(intermediate):
    (w13, sf1), (w2, sf2) = make(intermediate=intermediate)
    spread = [torch.cat([w.view(torch.uint8)] * 2, dim=-1).view(E4M3)[..., : w.shape[-1]] for w in (w13, w2)]
    assert not any(w.is_contiguous() for w in spread)
    expected = transform((w13, sf1), (w2, sf2))
    made = transform((spread[0], sf1), (spread[1], sf2))
    assert all(same(a[0], b[0]) for a, b in zip(made, expected, strict=True))
    with pytest.raises(ConfigError, match=r"l1 weights have strides .*in place: each expert's rows one after"):
        transform((spread[0], sf1), (spread[1], sf2), inplace=True)  # no call could read them there
    assert same(spread[0].contiguous(), w13)


@pytest.mark.parametrize("inplace", [True, False])
def test_chosen_experts_only(inplace):
    given = make(experts=4)
    originals = [pair[0].clone() for pair in given]
    full = transform(*given)
    made = transform(*given, inplace=inplace, experts=[3, 1])
    for original, whole, some in zip(originals, full, made, strict=True):
        for expert in range(4):
            assert same(some[0][expert], whole[0][expert] if expert in (1, 3) else original[expert])
    if not inplace:
        assert all(same(pair[0], original) for pair, original in zip(given, originals, strict=True))
    back = inverse(*made, experts=(1, 3))
    assert all(same(pair[0], original) for pair, original in zip(back, originals, strict=True))


def test_one_matrix_without_the_expert_dimension():
    l1, l2 = make()
    full = transform(l1, l2)
    slices = (l1[0][2], l1[1][2]), (l2[0][2], l2[1][2])
    for one, whole in zip(transform(*slices), full, strict=True):
        assert same(one[0], whole[0][2])
    transform(*slices, inplace=True)  # through the view into the whole tensor
    assert same(l1[0][2], full[0][0][2])
    assert same(l2[0][2], full[1][0][2])


def test_permuting_experts_commutes_with_the_transform():
    l1, l2 = make(experts=4)
    order = torch.tensor([2, 0, 3, 1])
    permuted = l1[0].view(torch.uint8)[order].view(E4M3), l1[1][order]
    permuted2 = l2[0].view(torch.uint8)[order].view(E4M3), l2[1][order]
    for a, b in zip(transform(permuted, permuted2), transform(l1, l2), strict=True):
        assert same(a[0], b[0].view(torch.uint8)[order])


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("direction", [transform, inverse])
def test_scratch_is_one_expert(direction):
    """In place, no tensor larger than one expert is allocated."""
    for inplace in (True, False):
        l1, l2 = make(experts=8)
        mark_transformed(l1, l2, transformed=direction is inverse)
        with Largest() as made:
            direction(l1, l2, inplace=inplace)
        assert made.numel == (l1[0][0] if inplace else l1[0]).numel()


@pytest.mark.parametrize("direction", [transform, inverse])
@pytest.mark.parametrize("which", [0, 1])
def test_experts_that_share_memory_are_not_permuted_in_place(direction, which):
    l1, l2 = make(1)
    pairs = [(w.expand(3, -1, -1), sf.expand(3, -1, -1)) for w, sf in (l1, l2)]
    before = [w[0].clone() for w, _ in pairs]
    given = [(w.clone(), sf) for w, sf in pairs]
    given[which] = pairs[which]
    mark_transformed(*given, transformed=direction is inverse)
    mark_transformed(*pairs, transformed=direction is inverse)
    name = f"l{which + 1} weights"
    with pytest.raises(ConfigError, match=f"elements of {name} are elements of {name} too; allowed with inplace=True"):
        direction(*given, inplace=True)
    assert all(same(w[0], old) for (w, _), old in zip(given, before, strict=True))
    copies = direction(*pairs)
    assert all(same(w[0], w[2]) for w, _ in copies)


def test_refusals_say_what_is_allowed():
    l1, l2 = make()
    with pytest.raises(ConfigError, match=r"l1 weights are torch\.float32; allowed: float8_e4m3fn or"):
        transform((l1[0].float(), l1[1]), l2)
    with pytest.raises(ConfigError, match=r"l2 scales are torch\.bfloat16"):
        transform(l1, (l2[0], l2[1].bfloat16()))
    with pytest.raises(ConfigError, match="l1 scales have shape"):
        transform((l1[0], l1[1][:, :1]), l2)
    with pytest.raises(ConfigError, match="l2 weights have shape"):
        transform(l1, (l2[0][:2], l2[1][:2]))
    with pytest.raises(ConfigError, match="multiples of 128"):
        transform((l1[0][:, :500], l1[1]), l2)
    with pytest.raises(ConfigError, match="a multiple of 256"):
        transform((l1[0][:, :384], l1[1][:, :3]), l2)
    with pytest.raises(ConfigError, match="l1 weights have shape"):
        transform((l1[0][0, 0], l1[1]), l2)
    for bad in ([3], [-1], [0, 0]):
        with pytest.raises(ConfigError, match="distinct local experts from 0 to 2"):
            transform(l1, l2, inplace=True, experts=bad)
    with pytest.raises(ConfigError, match="experts was given with one"):
        transform((l1[0][0], l1[1][0]), (l2[0][0], l2[1][0]), experts=[0])


def interrupt(patched, *copies):
    """Ctrl-C is answered behind a copy, once what was copied is there: behind the copies with these numbers."""
    copy, count = torch.Tensor.copy_, [0]

    def interrupted(target, *args, **named):
        copy(target, *args, **named)
        count[0] += target.dtype is torch.uint8
        if target.dtype is torch.uint8 and count[0] in copies:
            raise KeyboardInterrupt

    patched.setattr(torch.Tensor, "copy_", interrupted)


def given_to(direction, kind):
    """Weights that may go in this direction, and a copy."""
    plain = make() if kind == "fp8" else packed()
    source = plain if direction is transform else transform(*plain)
    given = tuple(tuple(each.clone() for each in pair) for pair in source)
    mark_transformed(*given, transformed=direction is inverse)
    return given, source


def packed(experts=3):
    gen = torch.Generator().manual_seed(0)

    def pair(rows, depth):
        codes = torch.randint(0, 256, (experts, rows, depth // 2), generator=gen, dtype=torch.uint8)
        return codes, torch.randint(120, 130, (experts, rows, depth // 32), generator=gen, dtype=torch.uint8)

    return pair(512, 128), pair(128, 256)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
@pytest.mark.parametrize("direction", [transform, inverse])
@pytest.mark.parametrize("behind", [1, 2, 5, 6])
def test_what_is_ended_half_way_leaves_weights_as_they_were(direction, kind, behind, monkeypatch):
    given, source = given_to(direction, kind)
    with monkeypatch.context() as patched:
        interrupt(patched, behind)
        with pytest.raises(KeyboardInterrupt):
            direction(*given, inplace=True)
    for found, wanted in zip(given, source, strict=True):
        assert all(same(a, b) for a, b in zip(found, wanted, strict=True))
    for found, wanted in zip(direction(*given, inplace=True), direction(*source), strict=True):
        assert all(same(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("direction", [transform, inverse])
def test_what_is_in_no_order_is_never_taken_for_what_it_is_not(direction, monkeypatch):
    """Ctrl-C, and again while it is answered."""
    given, source = given_to(direction, "fp8")
    with monkeypatch.context() as patched:
        interrupt(patched, 2, 3, 4)
        with pytest.raises(KeyboardInterrupt):
            direction(*given, inplace=True)
    for again in (transform, inverse):
        with pytest.raises(ConfigError, match="left half-way by a transform that was ended, and must be loaded again"):
            again(*given, inplace=True, experts=[1])
    for (codes, _), (loaded, _) in zip(given, source, strict=True):
        codes.view(torch.uint8).copy_(loaded.view(torch.uint8))
    mark_transformed(*given, transformed=direction is inverse)
    for found, wanted in zip(direction(*given, inplace=True), direction(*source), strict=True):
        assert same(found[0], wanted[0])


def test_nothing_is_transformed_in_a_capture(monkeypatch):
    weights = make()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for inplace in (False, True):
        with pytest.raises(CaptureError, match="brought into another order while a CUDA graph is being captured"):
            transform(*weights, inplace=inplace)
    monkeypatch.undo()
    ordered = transform(*weights, inplace=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CaptureError):
        inverse(*ordered, inplace=True)
