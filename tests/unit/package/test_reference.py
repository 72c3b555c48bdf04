"""The reference against a second, slower writing of the same equations, and its edge cases."""

import math

import pytest
import torch

from megamoe_jit import reference
from megamoe_jit._check.scenarios import make_weights
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.quantize import (
    dequantize_activations,
    dequantize_weights,
    quantize_activations,
    quantize_weights,
)
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import calc_diff, expert_counts, moe_reference, row_diffs, swiglu, with_shared_experts

HIDDEN, INTERMEDIATE, EXPERTS, TOPK = 256, 384, 6, 3


def make(tokens=9, seed=0, hidden=HIDDEN, intermediate=INTERMEDIATE, experts=EXPERTS, topk=TOPK):
    gen = torch.Generator().manual_seed(seed)
    x, x_sf = quantize_activations(torch.randn(tokens, hidden, generator=gen))
    l1 = quantize_weights(torch.randn(experts, 2 * intermediate, hidden, generator=gen) * 0.05)
    l2 = quantize_weights(torch.randn(experts, hidden, intermediate, generator=gen) * 0.05)
    idx = torch.rand(tokens, experts, generator=gen).topk(topk).indices
    return x, x_sf, idx, torch.randn(tokens, topk, generator=gen), l1, l2


def one_by_one(x, x_sf, idx, weights, l1, l2, clamp):
    """Token by token and slot by slot in float64 except where the layer rounds."""
    w13, w2 = dequantize_weights(*l1).double(), dequantize_weights(*l2).double()
    xs = dequantize_activations(x, x_sf).double()
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for k in range(idx.shape[1]):
            e = int(idx[t, k])
            if e < 0:
                continue
            gate, up = (w13[e] @ xs[t]).chunk(2)
            if clamp is not None:
                gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
            h = (gate / (1 + torch.exp(-gate)) * up).float()
            for g in range(0, h.numel(), 128):
                scale = max(h[g : g + 128].abs().max().item(), 1e-10) / 448
                h[g : g + 128] = (h[g : g + 128] / scale).to(torch.float8_e4m3fn).float() * scale
            y[t] += weights[t, k].double() * (w2[e] @ h.double()).bfloat16().double()
    return y


@pytest.mark.parametrize("clamp", [None, 10.0, 0.5])
def test_equals_the_equations_one_by_one(clamp):
    args = make()
    args[2][2, 1] = args[2][4, 0] = -1
    args[2][5] = args[2][5, 0]  # one expert three times
    y = moe_reference(*args, activation_clamp=clamp)
    expected = one_by_one(*args, clamp)
    assert y.dtype is torch.bfloat16
    assert calc_diff(y, expected) < 1e-5  # bf16 of the result alone is 1e-6
    assert row_diffs(y, expected).max() < 2e-5
    precise = moe_reference(*args, activation_clamp=clamp, out_dtype=torch.float32)
    assert calc_diff(precise, expected) < 1e-6  # a code or a slot that rounds the other way


def test_clamp_bounds_gate_above_only_and_up_on_both_sides():
    values = torch.tensor([-5.0, -0.5, 0.5, 5.0])
    one = torch.ones(4)
    silu = lambda v: v / (1 + math.exp(-v))  # noqa: E731
    got = swiglu(values, one, 1.0)
    torch.testing.assert_close(got, torch.tensor([silu(-5.0), silu(-0.5), silu(0.5), silu(1.0)]))
    got = swiglu(one, values, 1.0)
    torch.testing.assert_close(got, silu(1.0) * torch.tensor([-1.0, -0.5, 0.5, 1.0]))
    assert swiglu(torch.tensor([math.nan]), one[:1], 1.0).isnan()
    assert swiglu(one[:1], torch.tensor([math.nan]), 1.0).isnan()


def test_without_requantisation_nothing_is_rounded_inside():
    x, x_sf, idx, weights, l1, l2 = make()
    y = moe_reference(x, x_sf, idx, weights, l1, l2, requantize=False, out_dtype=torch.float32)
    w13, w2, xs = dequantize_weights(*l1), dequantize_weights(*l2), dequantize_activations(x, x_sf)
    gate, up = torch.einsum("th,enh->ten", xs, w13).chunk(2, dim=-1)
    slots = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, w2)
    expected = torch.einsum("tk,tkh->th", weights, slots.gather(1, idx[..., None].expand(-1, -1, HIDDEN)))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    rounded = moe_reference(x, x_sf, idx, weights, l1, l2)
    assert 1e-4 < calc_diff(rounded, y) < 5e-4  # the e4m3 intermediate


def test_masked_slots_do_not_count_whatever_their_weight():
    x, x_sf, idx, weights, l1, l2 = make()
    idx[:, 1] = -1
    idx[3] = -1
    weights[idx < 0] = math.nan
    y = moe_reference(x, x_sf, idx, weights, l1, l2)
    assert (y[3] == 0).all()
    assert y.isfinite().all()
    kept = [0, 2]
    again = moe_reference(x, x_sf, idx[:, kept], weights[:, kept], l1, l2)
    assert torch.equal(y, again)
    assert (moe_reference(x, x_sf, torch.full_like(idx, -1), weights, l1, l2) == 0).all()


def test_slots_are_summed_in_slot_order_in_fp32(monkeypatch):
    monkeypatch.setattr(reference, "_expert", lambda x, *_: torch.ones_like(x))
    x, x_sf, idx, weights, l1, l2 = make()
    weights[:] = torch.tensor([1e8, 1.0, -1e8])
    assert (moe_reference(x, x_sf, idx, weights, l1, l2) == 0).all()
    weights[:] = torch.tensor([1e8, -1e8, 1.0])
    assert (moe_reference(x, x_sf, idx, weights, l1, l2) == 1).all()


def test_a_nan_row_stays_alone():
    x, x_sf, idx, weights, l1, l2 = make()
    clean = moe_reference(x, x_sf, idx, weights, l1, l2, activation_clamp=10.0)
    x.view(torch.uint8)[4, 7] = 0x7F
    y = moe_reference(x, x_sf, idx, weights, l1, l2, activation_clamp=10.0)
    assert y[4].isnan().all()
    rest = [t for t in range(9) if t != 4]
    torch.testing.assert_close(y[rest], clean[rest])


def test_no_tokens():
    args = make(tokens=0)
    assert moe_reference(*args).shape == (0, HIDDEN)


def test_chunks_of_a_hot_expert_do_not_show(monkeypatch):
    args = make(tokens=40)
    args[2][:] = torch.tensor([1, 1, 1])
    whole = moe_reference(*args)
    monkeypatch.setattr(reference, "_CHUNK", 7)
    assert calc_diff(moe_reference(*args), whole) < 1e-6


def test_expert_counts():
    idx = torch.tensor([[0, 3], [3, -1], [-1, -1], [3, 3]])
    counts = expert_counts(idx, 5)
    assert counts.dtype is torch.int32
    assert counts.tolist() == [1, 0, 0, 4, 0]
    assert expert_counts(torch.empty(0, 4, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_calc_diff_and_row_diffs():
    a = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
    b = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 3.0]])
    assert row_diffs(a, b).tolist() == [0.0, 0.0, 1.0]
    assert calc_diff(a, a) == 0.0
    assert calc_diff(a, b) == pytest.approx(1 - 2 * 5 / 28)
    assert calc_diff(a, torch.zeros_like(a)) == 1.0
    assert calc_diff(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0
    assert calc_diff(torch.empty(0, 4), torch.empty(0, 4)) == 0.0
    assert math.isnan(calc_diff(torch.tensor([math.nan]), torch.tensor([1.0])))
    # a relative error of r gives about r**2 / 2
    noisy = torch.full((1000,), 1.0)
    assert calc_diff(noisy, noisy * 1.01) == pytest.approx(0.01**2 / 2, rel=0.02)


def test_the_callers_matmul_precision_is_put_back():
    matmul = torch.backends.cuda.matmul
    saved = matmul.allow_tf32
    try:
        for setting in (True, False):
            matmul.allow_tf32 = setting
            moe_reference(*make(tokens=2))
            assert matmul.allow_tf32 is setting
    finally:
        matmul.allow_tf32 = saved


@pytest.mark.parametrize("odd", [-1, -2, 4, 5, 1 << 40, -(1 << 62)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_any_id_that_is_no_expert_is_masked(odd, dtype):
    """As the kernel does it; the weight of such a slot, even NaN, is no matter."""
    if dtype is torch.int32 and abs(odd) >= 1 << 31:
        odd = 2**31 - 1 if odd > 0 else -(2**31)
    shape = MoEShape(256, 128, 4, 2)
    drawn = make_weights(shape, "cpu")
    x = quantize_activations(torch.randn(3, 256, generator=torch.Generator().manual_seed(0)))
    ids = torch.tensor([[0, 3], [1, odd], [odd, odd]], dtype=dtype)
    weights = torch.tensor([[0.5, 0.25], [1.0, float("nan")], [1.0, 2.0]])
    masked = torch.where((ids < 0) | (ids > 3), -1, ids)
    y = moe_reference(*x, ids, weights, drawn.l1, drawn.l2)
    assert torch.equal(y, moe_reference(*x, masked.long(), weights, drawn.l1, drawn.l2))
    assert y.isfinite().all()
    assert (y[2] == 0).all()
    assert expert_counts(ids, 4).tolist() == [1, 1, 0, 1]


def spread(pair, shared, ranks):
    """Weights of all ranks' experts as they lie: each rank's routed ones, then the shared ones, which all have."""

    def part(tensor):
        tensor, more = tensor.view(torch.uint8)[:EXPERTS], tensor.view(torch.uint8)[EXPERTS:][:shared]
        return torch.cat([each for own in tensor.chunk(ranks) for each in (own, more)])

    return tuple(part(tensor).view(tensor.dtype) for tensor in pair)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_slots_of_shared_experts_add_a_layer_of_theirs(ranks):
    x, x_sf, idx, weights, l1, l2 = make(experts=EXPERTS + 2)
    idx = torch.where(idx % 5 == 3, idx - 4, idx)  # -1, and two that are no experts of the router
    everyone, ones = torch.tensor([[6, 7]]).expand(9, 2), torch.full((9, 2), 0.75)
    routed = torch.where(idx < EXPERTS, idx, -1)
    wanted = moe_reference(x, x_sf, torch.cat((routed, everyone), 1), torch.cat((weights, ones), 1), l1, l2)
    for rank in range(ranks):
        slots = with_shared_experts(idx, weights, EXPERTS, 2, shared_weight=0.75, rank=rank, ranks=ranks)
        assert (slots[0].dtype, slots[0].shape, slots[1].dtype) == (torch.int64, (9, TOPK + 2), weights.dtype)
        y = moe_reference(x, x_sf, *slots, spread(l1, 2, ranks), spread(l2, 2, ranks))
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("wrong", [{"ranks": 4}, {"ranks": 0}, {"rank": 1}, {"rank": -1}])
def test_shares_that_are_uneven_or_nobodys_are_refused(wrong):
    _, _, idx, weights, _, _ = make()
    with pytest.raises(ConfigError, match="allowed: experts that the ranks share evenly"):
        with_shared_experts(idx, weights, EXPERTS, 2, **wrong)
    assert with_shared_experts(idx, weights, EXPERTS, 0)[0].shape == idx.shape
