"""One call with the in-kernel timeline on: a trace for ui.perfetto.dev, and where the time of each role went.

    python -m benchmarks.timeline --shape v4-flash --tokens 1024 --trace trace.json

Needs a Hopper GPU.  The kernel that writes records is another kernel, a little slower; it is compiled for this alone.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.frame import hopper, parser, say
from benchmarks.timeline_records import Record, decode, summary, trace, words
from megamoe_jit._bench.clock import FLUSH_BYTES
from megamoe_jit._bench.measure import Layer, cases
from megamoe_jit._check.scenarios import make_inputs
from megamoe_jit._layer.bound_kernel import BoundKernel
from megamoe_jit._spec import FORMATS, FP8, WeightFormat
from megamoe_jit.heuristics.presets import preset

ROUNDS = 3  #: the last one is kept


def record(shape: str, tokens: int, variant: str, device: torch.device, weights: WeightFormat = FP8) -> list[Record]:
    """The records of one call, after some others, with the L2 flushed."""
    (case,) = cases([preset(shape)], [tokens], weights.name)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    with closing(Layer(case.shape, tokens, device, weights)) as layer:
        inputs = make_inputs(case, device, weights=layer.weights)
        y = torch.empty(tokens, case.shape.hidden, dtype=torch.bfloat16, device=device)
        plan = layer.buffer.plan(tokens, variant, case.numerics, None, weights=weights)
        spec = replace(plan.kernel.spec, timeline=True)
        room = torch.zeros(words(plan.num_sms), dtype=torch.int64, device=device)
        kernel = BoundKernel(spec, layer.buffer.place, timeline=room.data_ptr())
        for _ in range(ROUNDS):
            inputs.stage(layer.buffer)
            room.zero_()
            flush.zero_()
            layer.launch(replace(plan, kernel=kernel), y, case)
            layer.buffer.check()
        return decode(room.cpu())


def main() -> int:
    """Run once, print the summary; 3 without a Hopper GPU."""
    arguments = parser(__doc__)
    arguments.add_argument("--shape", default="v4-flash")
    arguments.add_argument("--tokens", type=int, default=1024)
    arguments.add_argument("--variant", default="auto")
    arguments.add_argument("--weight-format", default=FP8.name, choices=tuple(FORMATS))
    arguments.add_argument("--trace", type=Path, help="write a Chrome/Perfetto trace")
    arguments.add_argument("--every", type=int, default=1, help="only every n-th block in the trace")
    options = arguments.parse_args()
    device = hopper(arguments)
    records = record(options.shape, options.tokens, options.variant, device, FORMATS[options.weight_format])
    if options.trace:
        title = f"{torch.cuda.get_device_name()}: {options.shape}, {options.tokens} tokens"
        found = trace(records, title, range(0, 1 << 16, options.every))
        options.trace.write_text(json.dumps(found), encoding="utf-8")
    say("role         what                 count   median us  longest us  share")
    for part in summary(records):
        times = f"{part['median_us']:11.2f} {part['longest_us']:11.2f} {part['share']:6.1%}"
        say(f"{part['role']:12} {part['what']:20} {part['count']:5} {times}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
