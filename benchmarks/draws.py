"""What a call of few tokens takes by the experts that its routing touches: FP8 and MXFP4 in turns, over many draws.

    python -m benchmarks.draws [--shapes v4-flash,v4-pro] [--tokens 8] [--draws 24] [--output draws.json]

With few tokens the time is that of reading the experts that are touched, which a draw of the routing decides: `bench`
has one draw, and two draws of one row can differ by a fifth.  So figures of few tokens are compared at equal numbers of
experts, or as ratios within a draw.  By the protocol of `bench`; what is printed is a table in Markdown.  Needs a
Hopper GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch

from benchmarks.frame import asked, keep, parser, rows_by_shape, say
from benchmarks.markdown import table
from megamoe_jit._bench.clock import FLUSH_BYTES, TimedCall, burst
from megamoe_jit._bench.measure import Layer, some_rows
from megamoe_jit._check.scenarios import Scenario, make_inputs
from megamoe_jit._spec import FP8, MXFP4, MoEShape
from megamoe_jit._spec.variants import AUTO
from megamoe_jit.reference import expert_counts

SHAPES, TOKENS, DRAWS = ("v4-flash", "v4-pro"), (8,), 24
STORED = FP8, MXFP4
HEAD = ("layer", "tokens", "experts touched", "draws", "FP8, µs", "MXFP4, µs", "MXFP4 / FP8", "right")

Layers = Mapping[str, Layer]


@contextmanager
def both(shape: MoEShape, most: int, device: torch.device) -> Iterator[Layers]:
    """A layer of each format, by its name; all gone at the end."""
    with ExitStack() as stack:
        yield {each.name: stack.enter_context(closing(Layer(shape, most, device, each))) for each in STORED}


def measure(case: Scenario, layers: Layers, seed: int, flush: torch.Tensor) -> dict[str, Any]:
    """One draw of inputs and routing: medians in microseconds, and how many experts it touches."""
    calls, right = {}, True
    for name, layer in layers.items():
        inputs = make_inputs(case, layer.device, seed, layer.weights)
        y = torch.empty(case.tokens, case.shape.hidden, dtype=torch.bfloat16, device=layer.device)
        where, expected = some_rows(case, inputs, layer.weights)
        calls[name] = TimedCall(layer.call(AUTO, y, case), partial(inputs.stage, layer.buffer))
        right &= layer.check(calls[name], y, where, expected).passed
    times = {name: statistics.median(found) for name, found in burst(calls, flush).items()}
    return {
        "seed": seed,
        "touched": int((expert_counts(inputs.topk_idx, case.shape.experts) > 0).sum()),
        **{f"{name}_us": time for name, time in times.items()},
        "ratio": times[MXFP4.name] / times[FP8.name],
        "correct": right,
    }


def _line(name: str, tokens: int, touched: str, draws: Sequence[Mapping[str, Any]]) -> str:
    means = (statistics.mean(draw[key] for draw in draws) for key in ("fp8_us", "mxfp4_us", "ratio"))
    figures = (format(mean, f".{digits}f") for mean, digits in zip(means, (1, 1, 3), strict=True))
    right = "yes" if all(draw["correct"] for draw in draws) else "WRONG"
    return table((name, str(tokens), touched, str(len(draws)), *figures, right), ())[0]


def lines(row: Mapping[str, Any]) -> str:
    """A row of the table for each number of experts, and the mean of all draws."""
    draws = sorted(row["draws"], key=lambda draw: draw["touched"])
    by_touched = [(str(count), list(group)) for count, group in groupby(draws, lambda draw: draw["touched"])]
    mean = format(statistics.mean(draw["touched"] for draw in draws), ".1f")
    return "\n".join(
        _line(row["shape"], row["tokens"], touched, group) for touched, group in [*by_touched, (f"mean {mean}", draws)]
    )


def main() -> int:
    """Measure and print; 1 if an output is wrong, 2 for wrong arguments, 3 without a Hopper GPU."""
    arguments = parser(__doc__)
    arguments.add_argument("--draws", type=int, default=DRAWS, choices=range(1, 1001), metavar="N", help="routings")
    wanted = asked(arguments, SHAPES, TOKENS)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=wanted.device)

    def draws_of(case: Scenario, layers: Layers) -> dict[str, Any]:
        found = [measure(case, layers, seed, flush) for seed in range(wanted.options.draws)]
        return {"shape": case.name, "tokens": case.tokens, "draws": found}

    say("\n".join(table(HEAD, ())))
    rows = rows_by_shape(
        wanted.presets, wanted.tokens, lambda shape, most: both(shape, most, wanted.device), draws_of, lines
    )
    keep("draws", wanted.output, rows=rows)
    return int(not all(draw["correct"] for row in rows for draw in row["draws"]))


if __name__ == "__main__":
    raise SystemExit(main())
