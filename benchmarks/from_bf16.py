"""The layer as a model calls it, from bf16 to bf16, beside its kernel alone.

    python -m benchmarks.from_bf16 --shapes v4-flash --tokens 1,64,8192 [--output from-bf16.json]
    python -m benchmarks.from_bf16 --ranks 2        # on several GPUs, each with its own part of the experts

Weights are FP8, and MXFP4 as well for the models that are published so.  In turns within the same rounds, after every
output was compared with the reference:

    kernel        `fp8_mega_moe` on inputs that are quantised and staged before
    kernel graph  the same as a CUDA graph of one node
    layer graph   `MegaMoE`, staging and all, as a CUDA graph
    layer eager   `MegaMoE` called, its host time hidden: the GPU is busy with something else meanwhile

and beside them the host's time of a call of each, and of an operation of torch on no elements.  Then, once:

    chain         eight small layers one after the other, called and as one CUDA graph, by the clock on the wall
    memory        43 layers of v4-flash that serve 8192 tokens: what they take beside their weights

Not these on several ranks, where the layer is what serving engines call (`from_bf16_ranks`).  Needs a Hopper GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

import megamoe_jit as mm
from benchmarks.frame import Asked, asked, keep, parser, rows_by_shape, say
from benchmarks.launch_cost import empty_op, medians_us
from megamoe_jit._bench.clock import FLUSH_BYTES, TimedCall, anchors, burst, captured
from megamoe_jit._bench.measure import cases, kernel_of, some_rows
from megamoe_jit._bench.on_ranks import measured_on_ranks, sizes_of
from megamoe_jit._check.scenarios import Inputs, Scenario, Weights, make_inputs, make_weights
from megamoe_jit._check.verify import judge
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._spec import FP8, MXFP4, MoEShape, WeightFormat
from megamoe_jit.heuristics.presets import Preset, preset

SHAPES = ("v4-flash", "v4-pro", "mimo-v2.5", "mimo-v2.5-pro")
PACKED_SHAPES = ("v4-flash", "v4-pro")  #: measured in MXFP4 as well
TOKENS = (1, 8, 64, 512, 1024, 8192)
CLAMP = 10.0
HOST_ROUNDS = 20
CHAIN_LAYERS, CHAIN_SHAPE, CHAIN_TOKENS, CHAIN_ROUNDS = 8, MoEShape(2048, 768, 16, 8), 8, 30
MEMORY_LAYERS, MEMORY_SHAPE, MEMORY_TOKENS = 43, "v4-flash", 8192

Call = Callable[[], torch.Tensor]  #: gives bf16 ``[T, hidden]``


def part_of(
    inputs: Inputs,
    judged: tuple[torch.Tensor, torch.Tensor],
    layer: tuple[WeightTensors, WeightTensors, mm.SymmBuffer],
    whole: Call,
    timed: Callable[[Mapping[str, TimedCall]], dict[str, list[float]]],
) -> dict[str, Any]:
    """What a rank measures of a case: medians in microseconds, of the GPU and of the host, and its verdicts.

    Args:
        inputs: of the case.
        judged: numbers of some rows, and their reference.
        layer: weights in the kernel's order, and the buffer.
        whole: the layer, staging and all.
        timed: times of calls that take turns.
    """
    y, (l1, l2, buffer) = torch.empty_like(inputs.x), layer

    def kernel() -> torch.Tensor:
        mm.fp8_mega_moe(y, l1, l2, buffer, activation_clamp=CLAMP)
        return y

    def stage() -> None:
        inputs.stage(buffer)

    stage()
    calls = {"kernel": kernel, "kernel_graph": captured(kernel), "layer_graph": captured(whole), "layer_eager": whole}
    where, expected = judged
    verdicts = []
    for name, call in calls.items():
        stage() if name.startswith("kernel") else buffer.topk_idx.fill_(-1)  # a layer stages for itself
        verdicts.append(asdict(judge(call()[where], expected)))
    times = timed({name: TimedCall(call, stage) for name, call in calls.items()})
    host = medians_us({"layer": whole, "kernel": kernel, "empty": empty_op(inputs.x.device)}, HOST_ROUNDS)
    buffer.check()
    return {
        "verdicts": verdicts,
        "times": {name: statistics.median(found) for name, found in times.items()},
        "host": host,
    }


def row_of(case: Scenario, kernel: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of what each rank measured: the largest figure of all."""
    times, host = ({name: max(part[of][name] for part in parts) for name in parts[0][of]} for of in ("times", "host"))
    verdicts = [verdict for part in parts for verdict in part["verdicts"]]
    more = times["layer_graph"] - times["kernel_graph"]
    return {
        "shape": case.name,
        "tokens": case.tokens,
        "weights": case.weights,
        "kernel": kernel,
        **{f"{name}_us": round(value, 2) for name, value in times.items()},
        "more_us": round(more, 2),
        "more_percent": round(100 * more / times["kernel_graph"], 2),
        "host_layer_us": round(host["layer"], 2),
        "host_kernel_us": round(host["kernel"], 2),
        "host_empty_op_us": round(host["empty"], 2),
        "correct": all(verdict["passed"] for verdict in verdicts),
        "diff": max(verdict["diff"] for verdict in verdicts),
        "worst_row_diff": max(verdict["worst_row_diff"] for verdict in verdicts),
    }


def measure(case: Scenario, layer: mm.MegaMoE, weights: Weights, flush: torch.Tensor) -> dict[str, Any]:
    """One row; times are medians in microseconds."""
    device = flush.device
    inputs = make_inputs(case, device, weights=weights)

    def whole() -> torch.Tensor:
        return layer(inputs.x, inputs.topk_idx, inputs.topk_weights)  # type: ignore[no-any-return]

    of_layer = layer.l1, layer.l2, layer.buffer
    part = part_of(inputs, some_rows(case, inputs, weights), of_layer, whole, lambda calls: burst(calls, flush))
    return row_of(case, kernel_of(case.shape, case.tokens, "auto", device, weights=case.weights), [part])


def chain(device: torch.device) -> dict[str, Any]:
    """Small layers one after the other, called and as one CUDA graph."""
    case = Scenario("chain", CHAIN_SHAPE, CHAIN_TOKENS, CHAIN_TOKENS, clamp=CLAMP)
    inputs = make_inputs(case, device)
    weights = Weights(inputs.l1, inputs.l2)
    options = {"topk": CHAIN_SHAPE.topk, "max_tokens": CHAIN_TOKENS, "clamp": CLAMP}
    layers = [mm.MegaMoE(weights.l1, weights.l2, **options) for _ in range(CHAIN_LAYERS)]  # type: ignore[arg-type]

    def eager() -> torch.Tensor:
        x = inputs.x
        for layer in layers:
            x = layer(x, inputs.topk_idx, inputs.topk_weights)
        return x

    graph = captured(eager)
    right = torch.equal(eager(), graph()) and bool(eager().isfinite().all())

    def ended(call: Call) -> Callable[[], None]:
        """With the end of its work on the GPU."""

        def run() -> None:
            call()
            torch.cuda.synchronize()

        return run

    times = medians_us({"eager": ended(eager), "graph": ended(graph)}, CHAIN_ROUNDS, batch=1)
    for layer in layers:
        layer.destroy()
    return {
        "layers": CHAIN_LAYERS,
        "hidden": CHAIN_SHAPE.hidden,
        "intermediate": CHAIN_SHAPE.intermediate,
        "experts": CHAIN_SHAPE.experts,
        "topk": CHAIN_SHAPE.topk,
        "tokens": CHAIN_TOKENS,
        **{f"{name}_us": round(value / CHAIN_LAYERS, 2) for name, value in times.items()},  # of one layer
        "eager_over_graph": round(times["eager"] / times["graph"], 3),
        "correct": right,
    }


def memory(device: torch.device, count: int, tokens: int) -> dict[str, Any]:
    """What the layers of a model take beside their weights, at the most, while they serve a batch one by one."""
    case = cases([preset(MEMORY_SHAPE)], [tokens])[0]
    drawn = make_weights(case.shape, device)
    inputs = make_inputs(case, device, weights=drawn)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    options = {"topk": case.shape.topk, "max_tokens": tokens, "clamp": CLAMP}
    layers = [mm.MegaMoE(drawn.l1, drawn.l2, **options) for _ in range(count)]  # type: ignore[arg-type]
    own = sum(tensor.nbytes for layer in layers for tensor in (*layer.l1, *layer.l2))
    torch.cuda.reset_peak_memory_stats(device)
    for layer in layers:
        layer(inputs.x, inputs.topk_idx, inputs.topk_weights)
    torch.cuda.synchronize()
    beside = torch.cuda.max_memory_allocated(device) - before - own
    for layer in layers:
        layer.destroy()
    return {
        "shape": case.name,
        "layers": count,
        "tokens": tokens,
        "weights_gib": round(own / 2**30, 2),
        "beside_gib": round(beside / 2**30, 3),
    }


#: Columns of the printed table: head, field, width, digits.
COLUMNS = (
    ("kernel", "kernel_us", 8, 1),
    ("in graph", "kernel_graph_us", 9, 1),
    ("layer graph", "layer_graph_us", 12, 1),
    ("eager", "layer_eager_us", 8, 1),
    ("more us", "more_us", 8, 1),
    ("more %", "more_percent", 7, 1),
    ("host layer", "host_layer_us", 11, 1),
    ("kernel", "host_kernel_us", 7, 1),
    ("empty op", "host_empty_op_us", 9, 2),
)


def head() -> str:
    """Of the printed table."""
    return f"{'layer, us':20}{'tokens':>7}" + "".join(f"{head:>{width}}" for head, _, width, _ in COLUMNS)


def line(row: Mapping[str, Any]) -> str:
    """A row as text."""
    figures = "".join(f"{row[field]:{width}.{digits}f}" for _, field, width, digits in COLUMNS)
    name = row["shape"] if row["weights"] == FP8.name else f"{row['shape']} {row['weights']}"
    return f"{name:20}{row['tokens']:7}{figures}{'' if row['correct'] else '  WRONG'}"


def rows_of(
    presets: Sequence[Preset], tokens: Sequence[int], device: torch.device, weights: str = FP8.name
) -> list[dict[str, Any]]:
    """The rows of the table, shape by shape."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    @contextmanager
    def make(shape: MoEShape, max_tokens: int) -> Iterator[tuple[mm.MegaMoE, Weights]]:
        drawn = make_weights(shape, device, 0, WeightFormat.parse(weights))
        layer = mm.MegaMoE(drawn.l1, drawn.l2, topk=shape.topk, max_tokens=max_tokens, clamp=CLAMP)
        try:
            yield layer, drawn
        finally:
            layer.destroy()

    return rows_by_shape(presets, tokens, make, lambda case, made: measure(case, *made, flush), line, weights)


def packed(presets: Sequence[Preset]) -> list[Preset]:
    """Those that are measured with packed weights as well."""
    return [each for each in presets if each.name in PACKED_SHAPES]


def _on_ranks(wanted: Asked) -> int:
    """The same on several ranks: those of torchrun if there is one, else started here."""
    shapes = [[*sizes_of(each), FP8.name] for each in wanted.presets]
    shapes += [[*sizes_of(each), MXFP4.name] for each in packed(wanted.presets)]
    target, given = "benchmarks.from_bf16_ranks:measure_on_rank", {"shapes": shapes, "tokens": wanted.tokens}
    say(head())
    try:
        found = measured_on_ranks(target, wanted.ranks, given, lambda row: say(line(row)))
    except ConfigError as error:
        say(f"Error: {error}")
        return 3
    if found is None:
        return 0
    own = found.pop("environment")
    keep("from_bf16", wanted.output, own, **found)
    return int(not all(row["correct"] for row in found["rows"]))


def main() -> int:
    """Measure and print; 1 if an output is wrong, 3 without a Hopper GPU."""
    wanted = asked(parser(__doc__), SHAPES, TOKENS, ranks=1)
    if wanted.ranks > 1:
        return _on_ranks(wanted)
    before = anchors()
    say(head())
    rows = rows_of(wanted.presets, wanted.tokens, wanted.device)
    rows += rows_of(packed(wanted.presets), wanted.tokens, wanted.device, MXFP4.name)
    small = chain(wanted.device)
    say(
        f"chain of {small['layers']} small layers: {small['eager_us']:.1f} us a layer eager, {small['graph_us']:.1f} "
        f"in a graph: {small['eager_over_graph']:.2f} times{'' if small['correct'] else '  WRONG'}"
    )
    held = memory(wanted.device, MEMORY_LAYERS, MEMORY_TOKENS)
    say(
        f"{held['layers']} layers of {held['shape']}, {held['tokens']} tokens: {held['beside_gib']:.2f} GiB beside "
        f"{held['weights_gib']:.1f} GiB of weights"
    )
    keep("from_bf16", wanted.output, anchors=[before, anchors()], chain=small, memory=held, rows=rows)
    return int(not (small["correct"] and all(row["correct"] for row in rows)))


if __name__ == "__main__":
    raise SystemExit(main())
