"""Time the layer over several nodes: the whole call, and its parts by themselves, the slowest rank of each.

The protocol of `measure_ranks`. What the parts are: `kernel`, the launch on what has arrived; `exchange`, dispatch and
combine without it. Of a call that can be captured, all three are replays of CUDA graphs, so that the host's time is in
none; of another the host's time counts from where it waits for the GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

import megamoe_jit
from megamoe_jit._bench.clock import IDLE_CYCLES, TimedCall
from megamoe_jit._bench.conditions import environment
from megamoe_jit._bench.documents import NodesRow
from megamoe_jit._bench.measure import as_fp8, require_hopper, some_rows
from megamoe_jit._bench.on_ranks import RankTimer, RankWeights, shape_on_ranks, sizes_of
from megamoe_jit._bench.unfused import Task
from megamoe_jit._bench.unfused_run import add_baselines, baseline_rows, fastest, unusable
from megamoe_jit._check.collect import collect
from megamoe_jit._check.scenarios import Inputs, Scenario, make_inputs
from megamoe_jit._check.spawn import World
from megamoe_jit._check.verify import buffer_sizes, judge
from megamoe_jit._layer.group import gather
from megamoe_jit._nodes.buffer import MultiNodeBuffer
from megamoe_jit._nodes.experts import CallOptions
from megamoe_jit._nodes.model import cost
from megamoe_jit._nodes.topology import NodeTopology
from megamoe_jit._spec import FP8, MoEShape, WeightFormat
from megamoe_jit.heuristics.presets import Preset

_SIDE_STREAM_CALLS = 2  #: before a capture, as torch wants it
_AHEAD_CYCLES = 16 * IDLE_CYCLES  #: about 1.5 ms: what the host has enqueued for a GPU that has the layer before to do


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """Replays of a call."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_SIDE_STREAM_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


class _Layer(RankWeights):
    """One shape on this rank: weights, and the ranks."""

    def __init__(self, world: World, topology: NodeTopology, shape: MoEShape, weights: str) -> None:
        super().__init__(world, shape, weights)
        self.topology = topology

    def buffer(self, tokens: int, ways: dict[str, Any]) -> MultiNodeBuffer:
        """A buffer for calls with so many tokens."""
        sizes = buffer_sizes(self.shape, tokens)
        return megamoe_jit.get_multinode_buffer_for_mega_moe(self.topology, *sizes, device=self.device, **ways)


def _calls(
    layer: _Layer, buffer: MultiNodeBuffer, inputs: Inputs, y: torch.Tensor, clamp: float | None
) -> dict[str, TimedCall]:
    """The whole call and, where it is in one piece, its parts; all of them after `inputs` were staged once."""
    l1, l2, tokens = layer.l1, layer.l2, y.shape[0]

    def whole() -> None:
        megamoe_jit.fp8_mega_moe_multinode(y, l1, l2, buffer, activation_clamp=clamp)

    inputs.stage(buffer)
    whole()
    buffer.check()
    parts: dict[str, Callable[[], object]] = {"whole": whole}
    capturable = buffer.choices.pick(tokens, False).capturable
    if buffer.chunks == 1 and layer.topology.nodes > 1:
        under_way = buffer.dispatch(tokens)
        lane, arrived = under_way.lane, under_way.arrived
        options = CallOptions(math.inf if clamp is None else clamp, weights=layer.format)
        options = replace(options, variant=lane.experts.variant_for(tokens, options))  # as the whole call has it

        def kernel() -> None:
            lane.experts.compute(arrived, lane.partial[: arrived.rows], l1, l2, options)
            lane.busy = False

        def exchange() -> None:
            brought = buffer.dispatch(tokens)
            brought.lane.busy = False
            buffer.combine(brought, y)

        kernel()
        parts |= {"kernel": kernel, "exchange": exchange}
    if capturable:
        parts = {name: _captured(call) for name, call in parts.items()}
    return {name: TimedCall(call) for name, call in parts.items()}


def _measure(
    layer: _Layer, timer: RankTimer, case: Scenario, ways: dict[str, Any], methods: dict[str, str]
) -> dict[str, Any]:
    """One case on this rank."""
    topology = layer.topology
    inputs = make_inputs(case, layer.device, topology.rank, layer.weights)
    y = torch.empty(case.tokens, case.shape.hidden, dtype=torch.bfloat16, device=layer.device)
    where, expected = some_rows(case, inputs, layer.weights)
    with layer.buffer(case.tokens, ways) as buffer:
        calls = _calls(layer, buffer, inputs, y, case.clamp)
        y.fill_(float("nan"))
        calls["whole"].run()
        buffer.check()
        verdict = judge(y[where], expected)
        found = {"exchange": buffer.choices.pick(case.tokens, False).name, "chunks": buffer.chunks}
        diff = lambda out: float(judge(out[where], expected).diff)  # noqa: E731
        task = Task(inputs, as_fp8(layer.own), case.shape.experts, case.clamp, topology.group)
        facts = add_baselines(calls, methods, task, diff)
        times = timer.burst(calls)
        buffer.check()
    return {**found, "times": times, "baselines": facts, "diff": verdict.diff, "correct": verdict.passed}


def _row(case: Scenario, topology: NodeTopology, partial: str, parts: Sequence[dict[str, Any]]) -> NodesRow:
    """The slowest rank of each part."""
    nodes, ranks = topology.nodes, topology.ranks_per_node
    first, medians = parts[0], {}
    for name in ("whole", "kernel", "exchange"):
        if name in first["times"]:
            medians[name] = max(statistics.median(part["times"][name]) for part in parts)
    rest = None
    if len(medians) == 3:
        rest = medians["whole"] - medians["kernel"] - medians["exchange"]
    local = MoEShape(case.shape.hidden, case.shape.intermediate, case.shape.experts // (nodes * ranks), case.shape.topk)
    others = baseline_rows(case.name, local, case.tokens, nodes * ranks, parts)
    best = fastest(others, medians["whole"])
    model = cost(
        case.shape, nodes, ranks, case.tokens, exchange=first["exchange"] if nodes > 1 else "auto",
        chunks=first["chunks"], partial_bytes=4 if partial == "fp32" else 2, weights=WeightFormat.parse(case.weights),
    )  # fmt: skip
    return NodesRow(
        shape=case.name,
        tokens=case.tokens,
        weights=case.weights,
        nodes=nodes,
        ranks_per_node=ranks,
        exchange=first["exchange"] if nodes > 1 else "none",
        partial=partial,
        chunks=first["chunks"],
        whole_us=medians["whole"],
        kernel_us=medians.get("kernel"),
        exchange_us=medians.get("exchange"),
        rest_us=rest,
        modelled_us=model.total_us,
        sent_bytes=int(model.sent_bytes),
        diff=max(part["diff"] for part in parts),
        correct=all(part["correct"] for part in parts),
        **best,
    )


def measure_on_rank(
    world: World,
    ranks_per_node: int,
    shapes: list[list[Any]],
    tokens: list[int],
    ways: dict[str, Any],
    baseline: bool,
    weights: str = FP8.name,
) -> dict[str, Any]:
    """What each rank does: all cases, in the same order; rank 0 reports each when all ranks have it."""
    import torch.distributed as dist

    from megamoe_jit._documents import plain

    require_hopper()
    group: Any = dist.group.WORLD
    topology = NodeTopology(group, ranks_per_node=ranks_per_node)
    timer = RankTimer(world.device, _AHEAD_CYCLES)
    methods = unusable(world.device, group) if baseline else {}
    for name, *sizes in shapes:
        torch.cuda.empty_cache()
        shape = shape_on_ranks(world, *sizes)
        layer = _Layer(world, topology, shape, weights)
        for count in sorted(tokens):
            case = Scenario(name, shape, count, count, weights=weights)
            parts = gather(group, _measure(layer, timer, case, ways, methods))
            if world.rank == 0:
                world.report(plain(_row(case, topology, str(ways.get("partial", "bf16")), parts)))
        del layer
    return {"environment": environment()}


def run(
    presets: Iterable[Preset],
    tokens: Sequence[int],
    nodes: int,
    ranks_per_node: int,
    ways: dict[str, Any],
    *,
    baseline: bool = True,
    weights: str = FP8.name,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any] | None:
    """Measure over several nodes: those of torchrun if there is one, else GPUs of this host that play them.

    Args:
        presets: shapes; each GPU gets the experts of one of their ranks.
        tokens: per GPU.
        nodes, ranks_per_node: how many.
        ways: arguments of `get_multinode_buffer_for_mega_moe`.
        baseline: time the unfused layer too, with the same values in FP8.
        weights: the format of the weights.
        progress: called with each row as it is measured.

    Returns:
        Conditions and rows; None on the ranks of torchrun that have nothing to say.

    Raises:
        ConfigError: there are not as many GPUs.
        MegaMoeError: a rank failed; says what all of them said.
    """
    if not torch.cuda.is_available():
        require_hopper()
    shapes = [*map(sizes_of, presets)]
    rows: list[dict[str, Any]] = []

    def note(_: int, row: dict[str, Any]) -> None:
        rows.append(row)
        progress(row)

    arguments = {"ranks_per_node": ranks_per_node, "shapes": shapes, "tokens": list(tokens), "ways": ways}
    arguments |= {"baseline": baseline, "weights": weights}
    target = "megamoe_jit._bench.measure_nodes:measure_on_rank"
    ends = collect(target, nodes * ranks_per_node, arguments, on_report=note)
    return None if ends is None else {"environment": ends[0]["environment"], "rows": rows}
