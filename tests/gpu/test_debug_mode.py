"""Ids that are no expert, with debug mode and without; and layers whose inputs change from stream to stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._check.scenarios import Inputs
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import expert_counts
from tests.gpu.harness import CLAMP, VARIANTS, Layer, equal_bits, poisoned

SHAPE = MoEShape(1024, 768, 16, 4)
LONG = MoEShape(4096, 2048, 16, 4)  # a call of it outlasts the staging of the next
TOKENS, CALLS = 1024, 12
NO_EXPERTS = (SHAPE.experts, -2, 2**32 + 1, -(2**40))


@pytest.fixture(scope="module")
def layer(device: torch.device) -> Layer:
    return Layer(SHAPE, device)


@pytest.fixture(scope="module")
def long(device: torch.device) -> Layer:
    return Layer(LONG, device)


def passed(layer: Layer, y: torch.Tensor, inputs: Inputs) -> None:
    verdict = layer.judge(y, inputs)
    assert verdict.passed, verdict.reason


def with_ids(inputs: Inputs, *ids: int) -> Inputs:
    """The same, but every slot of token 3 and one of token 5 name these ids in turn."""
    changed = inputs.topk_idx.clone()
    changed[3] = torch.tensor([ids[slot % len(ids)] for slot in range(changed.shape[1])], device=changed.device)
    changed[5, 1] = ids[0]
    return replace(inputs, topk_idx=changed)


@contextmanager
def moe(layer: Layer) -> Iterator[mm.MegaMoE]:
    it = mm.MegaMoE(layer.weights.l1, layer.weights.l2, topk=layer.shape.topk, max_tokens=TOKENS, clamp=CLAMP)
    try:
        yield it
    finally:
        it.destroy()


def in_turn(layer: Layer, call: Callable[[Inputs], torch.Tensor]) -> None:
    """Calls on two streams in turn, each with inputs of its own, none of which waits on the host."""
    inputs = [layer.inputs(TOKENS - 3 * seed, seed) for seed in range(CALLS)]
    streams = [torch.cuda.Stream(layer.device) for _ in range(2)]
    outputs = []
    torch.cuda.synchronize()
    for number, each in enumerate(inputs):
        with torch.cuda.stream(streams[number % 2]):
            outputs.append(call(each))
    torch.cuda.synchronize()
    for y, each in zip(outputs, inputs, strict=True):
        passed(layer, y, each)


@pytest.mark.parametrize("bad", NO_EXPERTS)
def test_debug_mode_refuses_an_id_that_is_no_expert_before_the_launch(layer: Layer, bad: int) -> None:
    inputs = layer.inputs(64)
    wrong, y = with_ids(inputs, bad), poisoned(64, SHAPE.hidden, layer.device)
    with override(debug=True), layer.buffer(64) as buffer:
        with pytest.raises(mm.ConfigError, match=rf"topk_idx\[3, 0\] = {bad} is not an expert; .* 0 to 15"):
            layer.call(buffer, wrong, y=y)
        buffer.check()
        assert y.isnan().all()
        passed(layer, layer.call(buffer, inputs), inputs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_debug_mode_lets_experts_and_masked_slots_through(layer: Layer, variant: str) -> None:
    inputs = with_ids(layer.inputs(200, masked_ratio=0.3), 0, -1, SHAPE.experts - 1)
    with layer.buffer(256) as buffer:
        expected = layer.call(buffer, inputs, variant)
        buffer.topk_idx[200:] = SHAPE.experts  # rows that no token of this call has
        with override(debug=True):
            y = layer.call(buffer, inputs, variant)
    passed(layer, y, inputs)
    assert equal_bits(y, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [64, 300])
def test_without_debug_mode_an_id_that_is_no_expert_is_masked(layer: Layer, variant: str, tokens: int) -> None:
    drawn = layer.inputs(tokens)
    wrong, masked = with_ids(drawn, *NO_EXPERTS), with_ids(drawn, -1)
    stats = torch.zeros(SHAPE.experts, dtype=torch.int32, device=layer.device)
    with layer.buffer(tokens) as buffer:
        y = layer.call(buffer, wrong, variant, stats)
        expected = layer.call(buffer, masked, variant)
        buffer.check()
    passed(layer, y, masked)
    assert equal_bits(y, expected)
    assert (y[3] == 0).all(), "all its slots are masked"
    assert torch.equal(stats, expert_counts(masked.topk_idx, SHAPE.experts))


def test_a_layer_called_on_two_streams_in_turn_reads_the_inputs_of_each_call(long: Layer) -> None:
    with moe(long) as it:
        in_turn(long, lambda inputs: it(inputs.x, inputs.topk_idx, inputs.topk_weights))
        it.check()


def test_staging_on_another_stream_after_waiting_leaves_the_running_call_alone(long: Layer) -> None:
    """Half of the SMs are free for the copies while the call before them runs."""

    def call(inputs: Inputs) -> torch.Tensor:
        buffer.wait_for_last()
        return long.call(buffer, inputs, num_sms=60)

    with long.buffer(TOKENS) as buffer:
        long.call(buffer, long.inputs(TOKENS), num_sms=60)  # no later call compiles or loads
        in_turn(long, call)
        buffer.check()


def test_a_layer_that_is_not_inplace_leaves_the_codes_of_its_caller(layer: Layer) -> None:
    given = [layer.weights.l1[0], layer.weights.l2[0]]
    before, inputs = [codes.clone() for codes in given], layer.inputs(100)
    with moe(layer) as it:
        y = it(inputs.x, inputs.topk_idx, inputs.topk_weights)
        it.check()
        for codes, reordered in zip(given, (it.l1[0], it.l2[0]), strict=True):
            assert reordered.data_ptr() != codes.data_ptr()
            assert not equal_bits(reordered, codes), "the kernel reads another order"
    assert all(equal_bits(codes, same) for codes, same in zip(given, before, strict=True))
    passed(layer, y, inputs)
