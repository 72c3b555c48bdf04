"""What a change of the kernel does to its time: this checkout and another one in turns, on one GPU.

    git worktree add --detach ../older HEAD
    python -m benchmarks.change --before ../older --shapes v4-flash --tokens 64,1024 [--output change.json]

Both packages run in one process on the same weights, each in its own order, and the same inputs, within the same rounds
and by the protocol of `bench`.
Outputs are compared with the reference first, and with each other bit by bit. What is printed is a table in Markdown.
Needs a Hopper GPU; `python -m benchmarks.ranks --before ../older` does the same on several.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.beside import PACKAGE, another_checkout, put_beside
from benchmarks.checkout import commit
from benchmarks.frame import asked, keep, parser, rows_by_shape, say
from benchmarks.markdown import table
from megamoe_jit._bench.clock import FLUSH_BYTES, TimedCall, burst
from megamoe_jit._bench.measure import DEFAULT_TOKENS, Layer, some_rows
from megamoe_jit._check.scenarios import Scenario, make_inputs
from megamoe_jit._check.verify import buffer_sizes, function_of
from megamoe_jit._spec import FP8, MoEShape, WeightFormat
from megamoe_jit._spec.formats import FORMATS
from megamoe_jit._spec.variants import VARIANT_CHOICES

SHAPES = ("v4-flash", "v4-pro")
BEFORE = f"{PACKAGE}_before_change"
HEAD = ("layer", "tokens", "variant", "before, µs", "now, µs", "now / before", "bits", "right")


class Other(NamedTuple):
    """What the other package calls its kernels with."""

    buffer: Any
    l1: tuple[torch.Tensor, ...]
    l2: tuple[torch.Tensor, ...]


@contextmanager
def both(
    shape: MoEShape, max_tokens: int, device: torch.device, weights: WeightFormat
) -> Iterator[tuple[Layer, Other]]:
    """A layer, and the other package's buffer and weights for it; all gone at the end."""
    layer, its = Layer(shape, max_tokens, device, weights), import_module(BEFORE)
    pairs = its.transform_weights_for_mega_moe_sm90(layer.weights.l1, layer.weights.l2)
    buffer = its.get_symm_buffer_for_mega_moe(None, *buffer_sizes(shape, max_tokens))
    try:
        yield layer, Other(buffer, *pairs)
    finally:
        buffer.destroy()
        layer.close()


def measure(case: Scenario, layer: Layer, its: Other, variant: str, flush: torch.Tensor) -> dict[str, Any]:
    """One row: medians in microseconds of the layer and of the other package, and what came out."""
    function = function_of(import_module(BEFORE), variant)
    inputs = make_inputs(case, layer.device, weights=layer.weights)
    y = torch.empty(case.tokens, case.shape.hidden, dtype=torch.bfloat16, device=layer.device)
    calls = {
        "before": TimedCall(
            lambda: function(y, its.l1, its.l2, its.buffer, **case.options), lambda: inputs.stage(its.buffer)
        ),
        "now": TimedCall(layer.call(variant, y, case), lambda: inputs.stage(layer.buffer)),
    }
    where, expected = some_rows(case, inputs, layer.weights)
    outputs, verdicts = {}, {}
    for name, call in calls.items():
        verdicts[name] = layer.check(call, y, where, expected)
        outputs[name] = y.clone()
    times = {name: statistics.median(found) for name, found in burst(calls, flush).items()}
    for buffer in (its.buffer, layer.buffer):
        buffer.check()
    return {
        "shape": case.name,
        "tokens": case.tokens,
        "variant": variant,
        "weights": case.weights,
        **{f"{name}_us": time for name, time in times.items()},
        "ratio": times["now"] / times["before"],
        "same_bits": torch.equal(outputs["before"], outputs["now"]),
        "correct": verdicts["now"].passed,
        "diff": verdicts["now"].diff,
    }


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    times = f"{row['before_us']:.1f}", f"{row['now_us']:.1f}", f"{row['ratio']:.3f}"
    said = "the same" if row["same_bits"] else "others", "yes" if row["correct"] else "WRONG"
    return row["shape"], str(row["tokens"]), row["variant"], *times, *said


def main() -> int:
    """Measure and print; 1 if an output is wrong, 2 for wrong arguments, 3 without a Hopper GPU."""
    arguments = parser(__doc__)
    arguments.add_argument("--before", type=another_checkout, required=True, help="a checkout whose code takes turns")
    arguments.add_argument("--variant", default="auto", choices=VARIANT_CHOICES)
    arguments.add_argument("--weight-format", default=FP8.name, choices=tuple(FORMATS))
    wanted = asked(arguments, SHAPES, DEFAULT_TOKENS)
    options, device, weights = wanted.options, wanted.device, FORMATS[wanted.options.weight_format]
    with tempfile.TemporaryDirectory(prefix="megamoe-jit-before-") as folder:
        put_beside(options.before, BEFORE, Path(folder))
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        head, line = table(HEAD, ())
        say(f"{head}\n{line}")
        rows = rows_by_shape(
            wanted.presets,
            wanted.tokens,
            lambda shape, most: both(shape, most, device, weights),
            lambda case, made: measure(case, *made, options.variant, flush),
            lambda row: table(_cells(row), ())[0],
            weights.name,
        )
    keep("change", wanted.output, before=commit(options.before), rows=rows)
    return int(not all(row["correct"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
