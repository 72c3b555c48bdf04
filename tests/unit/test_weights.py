"""The gate/up interleave, its inverse, in place and by expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe_jit._errors import ConfigError
from megamoe_jit._weights import (
    inverse_transform_weights_for_mega_moe_sm90 as inverse,
)
from megamoe_jit._weights import (
    transform_weights_for_mega_moe_sm90 as transform,
)

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


def test_rows_come_in_groups_of_eight():
    l1, l2 = make()
    (w, sf), second = transform(l1, l2)
    intermediate = 256
    for row in range(2 * intermediate):
        group, within = divmod(row, 16)
        source = 8 * group + within if within < 8 else intermediate + 8 * group + within - 8
        assert same(w[:, row], l1[0][:, source])
    assert sf is l1[1]
    assert second is l2
    assert w.data_ptr() != l1[0].data_ptr()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_inverse_restores(experts, hidden, intermediate, inplace):
    l1, l2 = make(experts, 128 * hidden, 128 * intermediate)
    original = l1[0].clone()
    forth = transform(l1, l2, inplace=inplace)
    assert not same(forth[0][0], original)
    back = inverse(*forth, inplace=inplace)
    assert same(back[0][0], original)
    assert same(l1[0], original)


def test_inplace_writes_where_it_is_and_equals_the_copy():
    l1, l2 = make()
    expected = transform(l1, l2)[0][0]
    pointer = l1[0].data_ptr()
    (w, _), _ = transform(l1, l2, inplace=True)
    assert w.data_ptr() == pointer
    assert same(w, expected)
    assert same(l1[0], expected)


@pytest.mark.parametrize("inplace", [True, False])
def test_chosen_experts_only(inplace):
    l1, l2 = make(experts=4)
    original = l1[0].clone()
    full = transform(l1, l2)[0][0]
    (w, _), _ = transform(l1, l2, inplace=inplace, experts=[3, 1])
    for expert in range(4):
        assert same(w[expert], full[expert] if expert in (1, 3) else original[expert])
    if not inplace:
        assert same(l1[0], original)
    (back, _), _ = inverse((w, l1[1]), l2, experts=(1, 3))
    assert same(back, original)


def test_one_matrix_without_the_expert_dimension():
    l1, l2 = make()
    full = transform(l1, l2)[0][0]
    slice1, slice2 = (l1[0][2], l1[1][2]), (l2[0][2], l2[1][2])
    (w, _), _ = transform(slice1, slice2)
    assert w.shape == slice1[0].shape
    assert same(w, full[2])
    transform(slice1, slice2, inplace=True)  # through the view into the whole tensor
    assert same(l1[0][2], full[2])


def test_permuting_experts_commutes_with_the_transform():
    l1, l2 = make(experts=4)
    order = torch.tensor([2, 0, 3, 1])
    permuted = l1[0].view(torch.uint8)[order].view(E4M3), l1[1][order]
    permuted2 = l2[0].view(torch.uint8)[order].view(E4M3), l2[1][order]
    a = transform(permuted, permuted2)[0][0]
    b = transform(l1, l2)[0][0].view(torch.uint8)[order]
    assert same(a, b)


def test_scratch_is_one_expert(monkeypatch):
    """In place, no tensor larger than one expert is allocated."""
    l1, l2 = make(experts=8)
    biggest = 0
    plain = torch.Tensor.contiguous

    def watch(self, *args, **kwargs):
        nonlocal biggest
        result = plain(self, *args, **kwargs)
        biggest = max(biggest, result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "contiguous", watch)
    with monkeypatch.context() as m:
        m.setattr(torch, "empty_like", lambda *a, **k: pytest.fail("a second copy of the weights"))
        m.setattr(torch.Tensor, "clone", lambda *a, **k: pytest.fail("a second copy of the weights"))
        transform(l1, l2, inplace=True)
    assert biggest == l1[0][0].numel()


def test_refusals_say_what_is_allowed():
    l1, l2 = make()
    with pytest.raises(ConfigError, match=r"l1 weights are torch\.float32; allowed: torch\.float8_e4m3fn"):
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
