"""This layer with MXFP4 weights in turns with other kernels that multiply them on Hopper.

    python -m benchmarks.others --shapes v4-flash --tokens 1,64,8192 [--output others.json]

What is timed, after every output was compared with the layer in FP32 on activations that nothing rounded:

    kernel   `fp8_mega_moe` on inputs that are quantised and staged before
    layer    `MegaMoE` from bf16 to bf16, staging and all, as a CUDA graph
    others   from bf16 to bf16 as CUDA graphs; one that is not installed or gives wrong results is named with the reason

Needs a Hopper GPU; what the others need is said in their modules.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

import megamoe_jit as mm
from benchmarks.frame import asked, keep, parser, rows_by_shape
from benchmarks.others.humming import KINDS
from benchmarks.others.marlin import Marlin
from benchmarks.others.ogs import TritonKernels
from megamoe_jit._bench.clock import FLUSH_BYTES, TimedCall, anchors, burst, captured
from megamoe_jit._bench.grouped_gemm import refusal
from megamoe_jit._bench.measure import CHECKED_TOKENS, kernel_of
from megamoe_jit._check.scenarios import Inputs, Scenario, Weights, make_inputs, make_weights
from megamoe_jit._layer.mxfp4 import dequantize
from megamoe_jit._spec import MXFP4, MoEShape
from megamoe_jit.heuristics.presets import Preset
from megamoe_jit.reference import calc_diff, swiglu

SHAPES = ("v4-flash", "v4-pro")
TOKENS = (1, 8, 64, 512, 1024, 8192)
CLAMP = 10.0
OWN = ("kernel", "layer")
#: `calc_diff` to the exact layer that activations in bf16 and in FP8 allow
BF16_BOUND, FP8_BOUND = 1e-4, 3e-3


class Other(Protocol):
    """Another implementation of the layer, for weights of one shape."""

    name: str  #: what it is called in tables
    exact_activations: bool  #: multiplied in bf16, not quantised

    def __init__(self, weights: Weights, shape: MoEShape, clamp: float, tokens: Sequence[int]) -> None: ...

    def build(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """The layer for fixed inputs, none of their slots masked; each call returns bfloat16 ``[T, H]``."""


OTHERS: tuple[type[Other], ...] = (Marlin, TritonKernels, *KINDS)


class Made:
    """What is measured of a shape: this layer, the others that can be made, and why the rest cannot."""

    def __init__(
        self, layer: mm.MegaMoE, weights: Weights, shape: MoEShape, tokens: Sequence[int], kinds: Sequence[type[Other]]
    ) -> None:
        self.layer, self.weights = layer, weights
        self.others: list[Other] = []
        self.refused: dict[str, str] = {}
        for kind in kinds:
            try:
                self.others.append(kind(weights, shape, CLAMP, tokens))
            except Exception as error:  # of a library that is not there, or is another release: anything
                self.refused[kind.name] = refusal(error)


def exact_rows(inputs: Inputs, weights: Weights, where: torch.Tensor, clamp: float) -> torch.Tensor:
    """Some rows of the layer in FP32 with activations that nothing rounds after `inputs.x`: float32 ``[R, H]``."""
    x, idx, share = inputs.x[where].float(), inputs.topk_idx[where], inputs.topk_weights[where]
    y = torch.zeros_like(x)
    for expert in sorted(set(idx.flatten().tolist())):
        w13, w2 = (dequantize(codes[expert], exponents[expert]) for codes, exponents in (weights.l1, weights.l2))
        row, slot = (idx == expert).nonzero(as_tuple=True)
        gate, up = (x[row] @ w13.t()).chunk(2, dim=-1)
        y.index_add_(0, row, share[row, slot, None] * (swiglu(gate, up, clamp) @ w2.t()))
    return y


def measure(case: Scenario, made: Made, flush: torch.Tensor) -> dict[str, Any]:
    """One row; times are medians in microseconds."""
    layer, weights = made.layer, made.weights
    inputs = make_inputs(case, flush.device, weights=weights)
    count = min(CHECKED_TOKENS, case.tokens)
    where = torch.linspace(0, case.tokens - 1, count, dtype=torch.float64, device=flush.device).long()
    expected, y = exact_rows(inputs, weights, where, CLAMP), torch.empty_like(inputs.x)

    def kernel() -> torch.Tensor:
        mm.fp8_mega_moe(y, layer.l1, layer.l2, layer.buffer, activation_clamp=CLAMP)
        return y

    def whole() -> torch.Tensor:
        return layer(inputs.x, inputs.topk_idx, inputs.topk_weights)  # type: ignore[no-any-return]

    inputs.stage(layer.buffer)
    calls: dict[str, Callable[[], torch.Tensor]] = {"kernel": kernel, "layer": captured(whole)}
    bounds, refused = dict.fromkeys(OWN, FP8_BOUND), dict(made.refused)
    for other in made.others:
        try:
            calls[other.name] = captured(other.build(inputs))
            bounds[other.name] = BF16_BOUND if other.exact_activations else FP8_BOUND
        except Exception as error:
            refused[other.name] = refusal(error)
    diffs = {}
    for name, call in list(calls.items()):
        inputs.stage(layer.buffer)
        diffs[name] = calc_diff(call()[where], expected)
        if not diffs[name] <= bounds[name] and name not in OWN:
            refused[name] = f"wrong results (calc_diff {diffs.pop(name):.2g})"
            del calls[name]
    found = burst({name: TimedCall(call, lambda: inputs.stage(layer.buffer)) for name, call in calls.items()}, flush)
    layer.buffer.check()
    return {
        "shape": case.name,
        "tokens": case.tokens,
        "variant": kernel_of(case.shape, case.tokens, "auto", flush.device, weights=case.weights),
        "times_us": {name: round(statistics.median(times), 2) for name, times in found.items()},
        "diffs": diffs,
        "refused": refused,
        "correct": all(diffs[name] <= bounds[name] for name in OWN),
    }


def line(row: Mapping[str, Any]) -> str:
    """A row as text, a line for each that took part."""
    own = row["times_us"]["layer"]
    lines = [f"{row['shape']}, {row['tokens']} tokens, {row['variant']}{'' if row['correct'] else '  WRONG'}"]
    for name, us in row["times_us"].items():
        lines.append(f"  {name:36}{us:10.1f} us {us / own:6.2f} x layer   diff {row['diffs'][name]:.1e}")
    lines += [f"  {name:36} not timed: {reason}" for name, reason in row["refused"].items()]
    return "\n".join(lines)


def rows_of(
    presets: Sequence[Preset], tokens: Sequence[int], device: torch.device, kinds: Sequence[type[Other]] = OTHERS
) -> list[dict[str, Any]]:
    """The rows of the table, shape by shape."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    @contextmanager
    def make(shape: MoEShape, max_tokens: int) -> Iterator[Made]:
        weights = make_weights(shape, device, 0, MXFP4)
        layer = mm.MegaMoE(
            weights.l1, weights.l2, topk=shape.topk, max_tokens=max_tokens, clamp=CLAMP, weight_format="mxfp4"
        )
        try:
            yield Made(layer, weights, shape, tokens, kinds)
        finally:
            layer.destroy()

    return rows_by_shape(presets, tokens, make, lambda case, made: measure(case, made, flush), line, MXFP4.name)


def main() -> int:
    """Measure and print; 1 if an output of this layer is wrong, 3 without a Hopper GPU."""
    wanted = asked(parser(__doc__), SHAPES, TOKENS)
    before = anchors()
    rows = rows_of(wanted.presets, wanted.tokens, wanted.device)
    keep("others", wanted.output, anchors=[before, anchors()], rows=rows)
    return int(not all(row["correct"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
