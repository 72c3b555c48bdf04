"""What a program sets in torch changes nothing; what a graph capture does not survive is refused; the program's end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._check.scenarios import Scenario
from megamoe_jit._check.verify import run_scenario
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import calc_diff, expert_counts, moe_reference
from tests.gpu.harness import Layer, equal_bits, poisoned
from tests.stubs import REPO, changed

SHAPE = MoEShape(512, 384, 8, 2)
TOKENS = 150


STATES: dict[str, Callable[[], AbstractContextManager]] = {
    "default device cuda": lambda: changed(torch.get_default_device, torch.set_default_device, "cuda"),
    "default device meta": lambda: changed(torch.get_default_device, torch.set_default_device, "meta"),
    "device context": lambda: torch.device("cuda"),
    "default bfloat16": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "default float64": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "inference mode": torch.inference_mode,
    "gradients": partial(torch.set_grad_enabled, True),
    "autocast": partial(torch.autocast, "cuda", dtype=torch.bfloat16),
    "deterministic": lambda: changed(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 2),
    "TF32": lambda: changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
}


@pytest.fixture(scope="module")
def layer(device: torch.device) -> Layer:
    return Layer(SHAPE, device)


def work(layer: Layer) -> list[torch.Tensor]:
    """What a program does with the package, and whatever comes out of it."""
    i = layer.inputs(TOKENS)
    made = mm.MegaMoE(layer.weights.l1, layer.weights.l2, topk=SHAPE.topk, max_tokens=TOKENS, clamp=10.0)
    try:
        y = made(i.x, i.topk_idx, i.topk_weights)
        made.check()
    finally:
        made.destroy()
    codes, scales = mm.quantize_activations(i.x)
    values = mm.dequantize_weights(*layer.weights.l1)
    expected = moe_reference(
        codes, scales, i.topk_idx, i.topk_weights, layer.weights.l1, layer.weights.l2, activation_clamp=10.0
    )
    assert calc_diff(y, expected) < 2e-4
    return [y, *made.l1, *made.l2, codes, scales, values, *mm.quantize_weights(values), expected]


@pytest.fixture(scope="module")
def plain(layer: Layer) -> list[torch.Tensor]:
    """What comes out where nothing is set."""
    return work(layer)


@pytest.mark.parametrize("name", STATES)
def test_everything_gives_the_same_bits_in_every_state(layer: Layer, plain: list[torch.Tensor], name: str):
    with STATES[name]():
        seen = work(layer)
    assert [each.dtype for each in seen] == [each.dtype for each in plain]
    assert [i for i, (a, b) in enumerate(zip(seen, plain, strict=True)) if not equal_bits(a, b)] == []


@pytest.mark.parametrize("name", STATES)
def test_verify_passes_in_every_state(device: torch.device, name: str):
    with STATES[name]():
        outcome = run_scenario(Scenario("state", SHAPE, TOKENS, 256, route="lognormal"), "auto", device)
    assert outcome.passed, outcome.reason


def test_a_layer_made_in_inference_mode_has_its_experts_exchanged_outside(layer: Layer, plain: list[torch.Tensor]):
    with torch.inference_mode():
        made = mm.MegaMoE(layer.weights.l1, layer.weights.l2, topk=SHAPE.topk, max_tokens=TOKENS, clamp=10.0)
    order = torch.arange(SHAPE.experts, dtype=torch.int64, device=layer.device) ^ 1
    for tensor in (*made.l1, *made.l2):
        raw = tensor.view(torch.uint8)
        raw.copy_(raw[order])
    i = layer.inputs(TOKENS)
    assert equal_bits(made(i.x, i.topk_idx ^ 1, i.topk_weights), plain[0])
    made.destroy()


def test_what_a_capture_does_not_survive_is_refused_and_the_capture_goes_on(layer: Layer, plain: list[torch.Tensor]):
    inputs, sizes = layer.inputs(TOKENS), (SHAPE.experts, 256, SHAPE.topk, SHAPE.hidden, SHAPE.intermediate)
    marker = torch.zeros(1, dtype=torch.float32, device=layer.device)
    y, graph = poisoned(TOKENS, SHAPE.hidden, layer.device), torch.cuda.CUDAGraph()
    with layer.buffer(256) as buffer:
        buffer.prepare_all()
        inputs.stage(buffer)
        torch.cuda.synchronize()
        refused = (
            lambda: mm.get_symm_buffer_for_mega_moe(None, *sizes),
            lambda: mm.MegaMoE(layer.weights.l1, layer.weights.l2, topk=SHAPE.topk, max_tokens=TOKENS),
            lambda: moe_reference(
                inputs.x_q, inputs.x_sf, inputs.topk_idx, inputs.topk_weights, layer.weights.l1, layer.weights.l2
            ),
            lambda: calc_diff(y, y),
            lambda: expert_counts(inputs.topk_idx, SHAPE.experts),
            lambda: buffer.prepare_all(fast_math=False),  # its kernels were never loaded
            buffer.check,
            buffer.destroy,
        )
        with torch.cuda.graph(graph):
            marker.add_(1)
            for action in refused:
                before = torch.cuda.memory_allocated()
                with pytest.raises(mm.CaptureError):
                    action()
                assert torch.cuda.memory_allocated() == before
            buffer.prepare_all()  # ready before
            mm.fp8_mega_moe(y, layer.l1, layer.l2, buffer, activation_clamp=10.0)
            marker.add_(1)
        graph.replay()
        buffer.check()
        assert marker.item() == 2
        assert equal_bits(y, plain[0])


AT_EXIT = """
import atexit, torch
import megamoe_jit as mm
from megamoe_jit._check.scenarios import Scenario, make_inputs
from megamoe_jit._spec import MoEShape

shape = MoEShape(512, 384, 8, 2)
i = make_inputs(Scenario("exit", shape, 20, 128), torch.device("cuda", 0))
layer = mm.MegaMoE(i.l1, i.l2, topk=2, max_tokens=128)

def at_exit():
    layer(i.x, i.topk_idx, i.topk_weights)
    layer.check()
    layer.destroy()
    print("destroyed", layer.buffer.buffer.numel())

atexit.register(at_exit)
layer(i.x, i.topk_idx, i.topk_weights)
"""


def test_a_layer_may_be_called_checked_and_destroyed_when_the_program_has_ended():
    run, variables = [sys.executable, "-c", AT_EXIT], {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(run, env=variables, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "destroyed 0\n"), done.stderr
    assert "SymmBuffer" not in done.stderr
