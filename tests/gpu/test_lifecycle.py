"""What one call does not show: many calls, many buffers, graphs, limited SMs, and refusals."""

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import expert_counts
from tests.gpu.harness import VARIANTS, Layer, equal_bits, poisoned

SHAPE = MoEShape(1024, 768, 16, 4)
CAPACITY = 512


@pytest.fixture(scope="module")
def layer(device):
    return Layer(SHAPE, device)


@pytest.fixture
def buffer(layer):
    with layer.buffer(CAPACITY) as buffer:
        yield buffer


def passed(layer, y, inputs):
    verdict = layer.judge(y, inputs)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("variant", ["auto", *VARIANTS])
def test_shrinking_and_growing_token_counts_on_one_buffer(layer, buffer, variant):
    for seed, tokens in enumerate((512, 255, 7, 0, 1, 256, 300, 64, 512, 129)):
        inputs = layer.inputs(tokens, seed)
        passed(layer, layer.call(buffer, inputs, variant), inputs)


def test_alternating_variants_on_one_buffer(layer, buffer):
    for seed, tokens in enumerate((300, 40, 511, 128, 1, 257)):
        inputs = layer.inputs(tokens, seed)
        variant = VARIANTS[seed % len(VARIANTS)]
        y = layer.call(buffer, inputs, variant)
        passed(layer, y, inputs)
        with layer.buffer(CAPACITY) as fresh:
            assert equal_bits(y, layer.call(fresh, inputs, variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_stats_accumulate_over_calls(layer, buffer, variant, device):
    stats = torch.zeros(SHAPE.experts, dtype=torch.int32, device=device)
    first, second = layer.inputs(200, 1), layer.inputs(90, 2, masked_ratio=0.4)
    counts = [expert_counts(i.topk_idx, SHAPE.experts) for i in (first, second)]
    layer.call(buffer, first, variant, stats)
    assert torch.equal(stats, counts[0])
    layer.call(buffer, second, variant, stats)
    assert torch.equal(stats, counts[0] + counts[1])
    layer.call(buffer, second, variant)  # without stats nothing is counted anywhere
    assert torch.equal(stats, counts[0] + counts[1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [5, 200, 512])
def test_same_bits_on_eight_runs_whatever_ran_before(layer, buffer, variant, tokens):
    inputs = layer.inputs(tokens, route="powerlaw:1.2")
    expected = layer.call(buffer, inputs, variant)
    passed(layer, expected, inputs)
    for run in range(8):
        if run % 2:
            layer.call(buffer, layer.inputs(1 + 71 * run, run, data="saturating"), VARIANTS[run // 2 % len(VARIANTS)])
        assert equal_bits(layer.call(buffer, inputs, variant), expected), f"run {run}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_back_to_back_calls_without_synchronising(layer, variant):
    """Eight calls in flight on one buffer and stream; the last staged inputs of each count."""
    sets = [layer.inputs(300, seed) for seed in range(4)]
    with layer.buffer(CAPACITY) as buffer:
        outputs = [layer.call(buffer, inputs, variant) for _ in range(2) for inputs in sets]
        torch.cuda.synchronize()
    for inputs, a, b in zip(sets, outputs[:4], outputs[4:], strict=True):
        passed(layer, a, inputs)
        assert equal_bits(a, b)


def test_two_buffers_alive(layer, device):
    other = Layer(MoEShape(512, 512, 8, 2), device, seed=1)
    ours, theirs = layer.inputs(260, 1), other.inputs(130, 2)
    with layer.buffer(CAPACITY) as a, layer.buffer(300) as b, other.buffer(130) as c:
        for _ in range(3):
            first, second = layer.call(a, ours), layer.call(b, ours)
            third = other.call(c, theirs)
            passed(layer, first, ours)
            assert equal_bits(first, second)
            passed(other, third, theirs)


def test_destroy_and_recreate(layer):
    inputs = layer.inputs(300)
    with layer.buffer(CAPACITY) as buffer:
        expected = layer.call(buffer, inputs)
    before = torch.cuda.memory_allocated()
    for capacity in (300, 512, 4096, 301, 512):
        with layer.buffer(capacity) as buffer:
            assert equal_bits(layer.call(buffer, inputs), expected)
    assert torch.cuda.memory_allocated() <= before
    with pytest.raises(mm.MegaMoeError):  # the last one is destroyed
        mm.fp8_mega_moe(poisoned(300, SHAPE.hidden, layer.device), layer.l1, layer.l2, buffer)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_sms", [1, 2, 37, 131])
def test_any_number_of_sms_gives_the_same_bits(layer, buffer, variant, num_sms):
    inputs = layer.inputs(150, route="lognormal")
    expected = layer.call(buffer, inputs, variant)
    passed(layer, expected, inputs)
    assert equal_bits(layer.call(buffer, inputs, variant, num_sms=num_sms), expected)


def test_a_side_stream(layer, buffer):
    inputs = layer.inputs(200)
    expected = layer.call(buffer, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = layer.call(buffer, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    assert equal_bits(y, expected)


@pytest.mark.parametrize("tokens", [64, 300])
def test_graph_replay_with_changed_inputs_equals_eager(layer, buffer, tokens, device):
    sets = [layer.inputs(tokens, seed) for seed in range(4)]
    eager = [layer.call(buffer, inputs) for inputs in sets]
    stats = torch.zeros(SHAPE.experts, dtype=torch.int32, device=device)
    y = poisoned(tokens, SHAPE.hidden, device)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        mm.fp8_mega_moe(y, layer.l1, layer.l2, buffer, stats, activation_clamp=10.0)
    expected_stats = torch.zeros_like(stats)
    for round_ in range(2):
        for inputs, expected in zip(sets, eager, strict=True):
            inputs.stage(buffer)
            y.fill_(float("nan"))
            graph.replay()
            assert equal_bits(y, expected)
            expected_stats += expert_counts(inputs.topk_idx, SHAPE.experts)
            assert torch.equal(stats, expected_stats)
            other = layer.inputs(500 - 99 * round_, 9)
            passed(layer, layer.call(buffer, other), other)  # eager calls in between, of other sizes


def test_check_and_destroy_in_a_capture_leave_all_as_it_is(layer, buffer, device):
    inputs = layer.inputs(64)
    expected = layer.call(buffer, inputs)
    y, graph = poisoned(64, SHAPE.hidden, device), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with override(debug=True), torch.cuda.graph(graph):  # debug mode waits for the device, but not in a capture
        mm.fp8_mega_moe(y, layer.l1, layer.l2, buffer, activation_clamp=10.0)
        for action in (buffer.check, buffer.destroy):
            with pytest.raises(mm.CaptureError, match="is capturing"):
                action()
    graph.replay()
    buffer.check()
    assert equal_bits(y, expected)
    assert equal_bits(layer.call(buffer, inputs), expected)


def test_two_buffers_on_two_streams_share_their_counters(layer, device):
    """With few SMs each, so that they run side by side."""
    stats = torch.zeros(SHAPE.experts, dtype=torch.int32, device=device)
    inputs = layer.inputs(90)
    streams = [torch.cuda.Stream() for _ in range(2)]
    with layer.buffer(CAPACITY) as one, layer.buffer(CAPACITY) as two:
        for buffer in (one, two):
            inputs.stage(buffer)
        torch.cuda.synchronize()
        for _ in range(200):
            for buffer, stream in zip((one, two), streams, strict=True):
                with torch.cuda.stream(stream):
                    y = torch.empty(90, SHAPE.hidden, dtype=torch.bfloat16, device=device)
                    mm.fp8_mega_moe(y, layer.l1, layer.l2, buffer, stats, activation_clamp=10.0, num_sms=60)
        torch.cuda.synchronize()
    assert torch.equal(stats, 400 * expert_counts(inputs.topk_idx, SHAPE.experts))


def test_graphs_of_two_sizes_interleaved(layer, buffer, device):
    cases = []
    for tokens in (64, 300):
        inputs = layer.inputs(tokens, tokens)
        expected = layer.call(buffer, inputs)
        y, graph = poisoned(tokens, SHAPE.hidden, device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mm.fp8_mega_moe(y, layer.l1, layer.l2, buffer, activation_clamp=10.0)
        cases.append((inputs, expected, y, graph))
    for _ in range(3):
        for inputs, expected, y, graph in cases:
            inputs.stage(buffer)
            y.fill_(float("nan"))
            graph.replay()
            assert equal_bits(y, expected)


def test_graphs_of_sizes_that_take_different_kernels(device):
    """No call before the captures, as servers do it: smallest batch last."""
    fresh = Layer(MoEShape(512, 384, 24, 3), device)  # no other test has this shape
    with override(cooperative_threshold=64), fresh.buffer(128) as buffer:
        buffer.prepare_all()
        graphs = []
        for tokens in (100, 20):
            y, graph = poisoned(tokens, 512, device), torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                mm.fp8_mega_moe(y, fresh.l1, fresh.l2, buffer, activation_clamp=10.0)
            graphs.append((tokens, y, graph))
        for tokens, y, graph in graphs:
            inputs = fresh.inputs(tokens)
            inputs.stage(buffer)
            graph.replay()
            passed(fresh, y, inputs)


def test_capturing_a_kernel_that_never_ran_is_refused_and_the_capture_goes_on(device):
    fresh = Layer(MoEShape(384, 256, 24, 3), device)  # no other test has this shape
    inputs = fresh.inputs(20)
    marker = torch.zeros(1, device=device)
    y = poisoned(20, 384, device)
    graph = torch.cuda.CUDAGraph()
    with fresh.buffer(32) as buffer:
        inputs.stage(buffer)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            marker.add_(1)
            with pytest.raises(mm.CaptureError):
                mm.fp8_mega_moe_pingpong(y, fresh.l1, fresh.l2, buffer, activation_clamp=10.0)
            marker.add_(1)
        graph.replay()
        assert marker.item() == 2
        assert y.isnan().all()
        passed(fresh, fresh.call(buffer, inputs, "pingpong"), inputs)


def _call_with(layer, buffer, **changed):
    """A right call but for what is changed; the output tensor and a thunk."""
    y = poisoned(64, SHAPE.hidden, layer.device)
    stats = torch.zeros(SHAPE.experts, dtype=torch.int32, device=layer.device)
    names = {"y": y, "l1": layer.l1, "l2": layer.l2, "stats": stats}
    args = {k: changed.pop(k, v) for k, v in names.items()}
    run = lambda: mm.fp8_mega_moe(args["y"], args["l1"], args["l2"], buffer, args["stats"], **changed)  # noqa: E731
    return args["y"], run


BAD = {
    "y dtype": lambda s, b: {"y": poisoned(64, SHAPE.hidden, s.device).float()},
    "y hidden": lambda s, b: {"y": poisoned(64, SHAPE.hidden - 128, s.device)},
    "y not contiguous": lambda s, b: {"y": poisoned(64, 2 * SHAPE.hidden, s.device)[:, ::2]},
    "y dimensions": lambda s, b: {"y": poisoned(64, SHAPE.hidden, s.device)[0]},
    "y on the CPU": lambda s, b: {"y": poisoned(64, SHAPE.hidden, torch.device("cpu"))},
    "tokens past the capacity": lambda s, b: {"y": poisoned(b.num_max_tokens_per_rank + 1, SHAPE.hidden, s.device)},
    "l1 dtype": lambda s, b: {"l1": (s.l1[0].view(torch.uint8), s.l1[1])},
    "l1 experts": lambda s, b: {"l1": (s.l1[0][:8], s.l1[1][:8])},
    "l1 not contiguous": lambda s, b: {"l1": (s.l1[0].mT.contiguous().mT, s.l1[1])},
    "l1 on the CPU": lambda s, b: {"l1": (s.l1[0].cpu(), s.l1[1])},
    "l1 scale shape": lambda s, b: {"l1": (s.l1[0], s.l1[1][:, :-1].contiguous())},
    "l1 scale dtype": lambda s, b: {"l1": (s.l1[0], s.l1[1].bfloat16())},
    "l1 not transformed": lambda s, b: {"l1": s.weights.l1},
    "l2 without a mark": lambda s, b: {"l2": (s.l2[0].clone(), s.l2[1])},
    "l1 and l2 exchanged": lambda s, b: {"l1": s.l2, "l2": s.l1},
    "l2 shape": lambda s, b: {"l2": (s.l2[0][:, :-128].contiguous(), s.l2[1])},
    "l2 scale not contiguous": lambda s, b: {"l2": (s.l2[0], s.l2[1].mT.contiguous().mT)},
    "stats dtype": lambda s, b: {"stats": torch.zeros(SHAPE.experts, dtype=torch.int64, device=s.device)},
    "stats length": lambda s, b: {"stats": torch.zeros(SHAPE.experts - 1, dtype=torch.int32, device=s.device)},
    "stats on the CPU": lambda s, b: {"stats": torch.zeros(SHAPE.experts, dtype=torch.int32)},
    "recipe": lambda s, b: {"recipe": (1, 128, 128)},
    "activation": lambda s, b: {"activation": "gelu"},
    "clamp": lambda s, b: {"activation_clamp": -1.0},
    "num_sms": lambda s, b: {"num_sms": 0},
}


@pytest.mark.parametrize("what", list(BAD))
def test_a_bad_argument_is_refused_before_launch(layer, buffer, what):
    inputs = layer.inputs(64)
    inputs.stage(buffer)
    y, run = _call_with(layer, buffer, **BAD[what](layer, buffer))
    with pytest.raises(mm.ConfigError):
        run()
    torch.cuda.synchronize()
    assert y.isnan().all()
    passed(layer, layer.call(buffer, inputs), inputs)


@pytest.mark.parametrize(
    "sizes",  # experts, capacity, top-k, hidden, intermediate
    [
        (128, 64, 4, 2880, 2880),
        (16, 64, 4, 1024, 700),
        (16, 64, 4, 0, 768),
        (16, 64, 33, 1024, 768),
        (16, 64, 0, 1024, 768),
        (1025, 64, 4, 1024, 768),
        (0, 64, 4, 1024, 768),
        (16, 32769, 4, 1024, 768),
        (16, -1, 4, 1024, 768),
    ],
)
def test_an_unsupported_size_is_refused_when_the_buffer_is_made(sizes):
    before = torch.cuda.memory_allocated()
    with pytest.raises(mm.ConfigError):
        mm.get_symm_buffer_for_mega_moe(None, *sizes)
    assert torch.cuda.memory_allocated() == before
