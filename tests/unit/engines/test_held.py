"""Experts in an engine's memory: into the kernel's order and back, in place; and what runs them."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace

import pytest
import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.given_weights import e8m0_of
from megamoe_jit._layer.weights import is_transformed
from megamoe_jit._spec import FP8, MXFP4, MoEShape
from megamoe_jit._spec.abi import Meeting, Wait
from megamoe_jit.engines import aside
from megamoe_jit.engines import watch as watching
from megamoe_jit.engines.across import _buffers, buffer_across
from megamoe_jit.engines.held import HeldExperts
from megamoe_jit.engines.local import LocalExperts
from tests.engines.standins import batch, expected, experts, kernels_by_reference, packed_experts

SHAPE = MoEShape(256, 128, 3, 2)


@pytest.fixture
def buffers(monkeypatch):
    _buffers.clear()
    yield kernels_by_reference(monkeypatch)
    _buffers.clear()


def bits(tensors):
    return [each.view(torch.uint8).clone() for each in tensors]


def test_there_and_back_in_place():
    l1, l2 = experts(SHAPE)
    tensors = (*l1, *l2)
    before, places = bits(tensors), [each.data_ptr() for each in tensors]
    held = HeldExperts(l1, l2)
    assert not held.ready
    for _ in range(2):
        held.to_kernel()
        assert held.ready
        assert is_transformed(l1, l2)  # the engine's memory itself
    for _ in range(2):
        held.to_plain()
        assert not held.ready
    assert all(map(torch.equal, bits(tensors), before))
    assert [each.data_ptr() for each in (*held.l1, *held.l2)] == places
    held.to_kernel()
    assert held.ready


def test_mxfp4_there_and_back_in_place():
    packed = [(codes, e8m0.view(torch.uint8)) for codes, e8m0 in packed_experts(SHAPE)]
    tensors = (*packed[0], *packed[1])
    before, places = bits(tensors), [each.data_ptr() for each in tensors]
    held = HeldExperts(*packed)
    held.to_kernel()
    assert (len(held.l1), held.hidden, held.intermediate, held.weights.name) == (3, 256, 128, "mxfp4")
    blocks = held.l1[2].data_ptr()
    held.to_plain()
    assert all(map(torch.equal, bits(tensors), before))
    held.to_kernel()
    assert held.l1[2].data_ptr() == blocks  # graphs know it
    assert [each.data_ptr() for each in (*held.l1[:2], *held.l2[:2])] == places


def test_mxfp4_in_the_kernels_order_has_lost_its_scales():
    packed = [(codes, e8m0.view(torch.uint8)) for codes, e8m0 in packed_experts(SHAPE)]
    HeldExperts(*packed).to_kernel()
    with pytest.raises(ConfigError, match="without their scales"):
        HeldExperts(*packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu, torch.uint8])
def test_exponents_of_scales(dtype):
    wanted = torch.arange(255, dtype=torch.uint8)
    powers = wanted.view(torch.float8_e8m0fnu)
    assert torch.equal(e8m0_of(powers.to(dtype) if dtype is torch.float32 else powers.view(dtype)), wanted)


@pytest.mark.parametrize("wrong", [0.0, 1.5, -2.0, float("inf")])
def test_scales_that_are_no_powers_of_two(wrong):
    with pytest.raises(ConfigError, match="not all powers of two"):
        e8m0_of(torch.tensor([1.0, wrong]))


def test_it_knows_its_memory():
    l1, l2 = experts(SHAPE)
    held = HeldExperts(l1, l2)
    assert held.keeps(*l1, *l2)
    assert held.keeps(*(torch.nn.Parameter(each, requires_grad=False) for each in (*l1, *l2)))
    assert not held.keeps(l1[0].clone(), l1[1], *l2)


def test_a_second_holder_of_the_same_memory_sees_its_order():
    l1, l2 = experts(SHAPE)
    HeldExperts(l1, l2).to_kernel()
    again = HeldExperts(l1, l2)
    assert again.ready
    again.to_kernel()
    again.to_plain()
    assert not is_transformed(l1, l2)


def test_threads_that_load_at_once_turn_it_back_once():
    l1, l2 = experts(SHAPE)
    before = bits(l1 + l2)
    held = HeldExperts(l1, l2)
    held.to_kernel()
    threads = [threading.Thread(target=held.to_plain) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(map(torch.equal, bits(l1 + l2), before))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: (w[0].to(torch.bfloat16), *w[1:]), "allowed: float8_e4m3fn"),
        (lambda w: (w[0], w[1].to(torch.bfloat16), *w[2:]), "allowed: torch.float32|FP8|float8"),
        (lambda w: (w[0], w[1][:, :1], *w[2:]), "one per 128 x 128"),
        (lambda w: (*(each[0] for each in w),), r"allowed: \[experts"),
        (
            lambda w: (w[0].view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(w[0].dtype), *w[1:]),
            "contiguous",
        ),
        (lambda w: (w[0][:, :, :200], w[1], w[2][:, :200], w[3]), "multiples of 128"),
    ],
)
def test_what_no_kernel_reads_is_refused_and_left_alone(change, said):
    l1, l2 = experts(SHAPE)
    before = bits(l1 + l2)
    changed = change((*l1, *l2))
    with pytest.raises(ConfigError, match=said):
        HeldExperts(changed[:2], changed[2:])
    assert all(map(torch.equal, bits(l1 + l2), before))


@pytest.mark.parametrize(("tokens", "factor"), [(0, 1.0), (5, 2.5), (130, 2.5)])
def test_local_experts(buffers, tokens, factor):
    l1, l2 = experts(SHAPE)
    held = HeldExperts(*(tuple(each.clone() for each in pair) for pair in (l1, l2)))
    held.to_kernel()
    run = LocalExperts(SHAPE, torch.device("cpu"), 128)
    of = batch(tokens, SHAPE)
    found = run(held.l1, held.l2, of.x, of.ids, of.weights, 0.7, factor)
    assert torch.equal(found, expected(of, l1, l2, 0.7, factor))
    assert buffers[0].prepared == 1


def test_an_operator_can_see_what_is_served(buffers, monkeypatch, caplog):
    monkeypatch.setattr(aside, "_warned", set())
    caplog.set_level("INFO", "megamoe_jit")
    for _ in range(2):  # layers of a model
        LocalExperts(SHAPE, torch.device("cpu"), 128)
        buffer_across(SimpleNamespace(), 8, 100, 2, 256, 128, weights=(FP8, MXFP4))
    sizes = "megamoe-jit warmup --hidden 256 --intermediate 128 --experts"
    assert [each.message.partition("serves layers of this engine, ")[2] for each in caplog.records] == [
        f"up to 128 tokens in a launch; ahead of time: {sizes} 3 --topk 2 --ranks 1",
        f"up to 100 tokens in a launch; ahead of time: {sizes} 8 --topk 2 --ranks 2",
        f"up to 100 tokens in a launch; ahead of time: {sizes} 8 --topk 2 --ranks 2 --weight-format mxfp4",
    ]


def test_a_kernel_that_gave_up_is_an_error_in_the_log(buffers, monkeypatch):
    said: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(watching, "_SECONDS", 0.01)
    monkeypatch.setattr(aside.LOG, "error", lambda form, *words: said.put(form % words))
    for _ in range(2):  # layers of a model
        run = LocalExperts(SHAPE, torch.device("cpu"), 128)
    with pytest.raises(queue.Empty):
        said.get(timeout=0.1)
    buffers[0].fault[:4] = torch.tensor([Wait.PEER_SIGNAL | 17 << 16, Meeting.INPUTS, 4, 0b1], dtype=torch.int32)
    message = said.get(timeout=10)
    assert message.startswith("rank 1: block 17, head, waited in vain for the other ranks to have their inputs ready")
    assert "launch 4 (missing: rank 0)" in message
    with pytest.raises(queue.Empty):  # it is said once
        said.get(timeout=0.1)
    assert run.shape == SHAPE


def test_one_buffer_for_a_group_and_its_sizes(buffers):
    one, other = SimpleNamespace(), SimpleNamespace()
    sizes = (8, 100, 2, 256, 128)
    assert buffer_across(one, *sizes) is buffer_across(one, *sizes)
    buffer_across(other, *sizes)
    buffer_across(one, *sizes[:4], 256)
    both = buffer_across(one, *sizes, weights=(FP8, MXFP4))
    assert both is buffers[0]
    assert both.formats == ["fp8", "mxfp4"]
    assert [(each.group, each.shape.intermediate) for each in buffers] == [(one, 128), (other, 128), (one, 256)]
    assert [each.prepared for each in buffers] == [2, 1, 1]
