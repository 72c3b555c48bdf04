"""One buffer used from several streams: launches must not overlap, whoever issues them."""

from __future__ import annotations

import torch

import megamoe_jit as mm
from megamoe_jit._check.scenarios import get
from tests.gpu.harness import CLAMP, Layer, equal_bits, poisoned


def test_branches_of_a_graph_take_turns_on_one_buffer(device: torch.device) -> None:
    """Half-size grids again, one on each branch: beside each other they would share the grid barrier and the ticket."""
    scenario = get("L2.heur.midA.t256")
    layer, tokens, branches = Layer(scenario.shape, device), scenario.tokens, 4
    inputs, side = layer.inputs(tokens), torch.cuda.Stream(device)
    outputs = [poisoned(tokens, layer.shape.hidden, device) for _ in range(2 * branches)]
    with layer.buffer(tokens) as buffer:
        buffer.prepare_all()
        inputs.stage(buffer)

        def call(y: torch.Tensor) -> None:
            mm.fp8_mega_moe(y, layer.l1, layer.l2, buffer, activation_clamp=CLAMP, num_sms=60)

        graph, expected = torch.cuda.CUDAGraph(), poisoned(tokens, layer.shape.hidden, device)
        call(expected)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            side.wait_stream(torch.cuda.current_stream())
            for pair in zip(outputs[::2], outputs[1::2], strict=True):
                call(pair[0])
                with torch.cuda.stream(side):
                    call(pair[1])
            torch.cuda.current_stream().wait_stream(side)
        for _ in range(10):
            for y in outputs:
                y.fill_(float("nan"))
            graph.replay()
            buffer.check()
            assert all(equal_bits(expected, y) for y in outputs)
    verdict = layer.judge(expected, inputs)
    assert verdict.passed, verdict.reason


def test_layers_on_branches_of_a_graph_share_a_workspace(device: torch.device) -> None:
    """Each stages in its own launch."""
    shape = get("L2.heur.midA.t256").shape
    drawn = Layer(shape, device).weights
    layers = [mm.MegaMoE(drawn.l1, drawn.l2, topk=shape.topk, max_tokens=64, clamp=clamp) for clamp in (CLAMP, None)]
    assert layers[0].buffer is layers[1].buffer
    batches = [
        (
            torch.randn(64, shape.hidden, device=device).bfloat16(),
            torch.rand(64, shape.experts, device=device).topk(shape.topk).indices,
            torch.rand(64, shape.topk, device=device),
        )
        for _ in layers
    ]
    expected = [each(*batch) for each, batch in zip(layers, batches, strict=True)]
    torch.cuda.synchronize()
    side, graph, found = torch.cuda.Stream(device), torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        found.append(layers[0](*batches[0]))
        with torch.cuda.stream(side):
            found.append(layers[1](*batches[1]))
        torch.cuda.current_stream().wait_stream(side)
    for _ in range(10):
        for y in found:
            y.fill_(float("nan"))
        graph.replay()
        layers[0].check()
        assert all(equal_bits(*pair) for pair in zip(expected, found, strict=True))
    for each in layers:
        each.destroy()


def test_calls_on_two_streams_are_ordered(device: torch.device) -> None:
    """Half-size grids would fit beside each other, and would share the grid barrier and the ticket."""
    scenario = get("L2.heur.midA.t256")
    layer, tokens = Layer(scenario.shape, device), scenario.tokens
    inputs = layer.inputs(tokens)
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    outputs = [poisoned(tokens, layer.shape.hidden, device) for _ in range(40)]
    with layer.buffer(tokens) as buffer:
        inputs.stage(buffer)  # once: calls leave the inputs as they are
        torch.cuda.synchronize()
        for i, y in enumerate(outputs):
            with torch.cuda.stream(streams[i % 2]):
                mm.fp8_mega_moe(y, layer.l1, layer.l2, buffer, activation_clamp=CLAMP, num_sms=60)
        buffer.check()
    verdict = layer.judge(outputs[0], inputs)
    assert verdict.passed, verdict.reason
    assert all(equal_bits(outputs[0], y) for y in outputs[1:])
