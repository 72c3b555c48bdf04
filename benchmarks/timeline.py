"""One call with the in-kernel timeline on: a trace for ui.perfetto.dev, and where the time of each role went.

    python -m benchmarks.timeline --shape v4-flash --tokens 1024 --trace trace.json

Needs a Hopper GPU.  The kernel that writes records is another kernel, a little slower; it is compiled for this alone.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.frame import hopper, parser
from benchmarks.timeline_records import Record, decode, summary, words, write_trace
from megamoe_jit._bench.clock import FLUSH_BYTES
from megamoe_jit._bench.measure import Layer, cases
from megamoe_jit._check.scenarios import make_inputs
from megamoe_jit._layer.bound_kernel import BoundKernel
from megamoe_jit.heuristics.presets import preset

ROUNDS = 3  #: the last one is kept


def record(shape: str, tokens: int, variant: str, device: torch.device) -> list[Record]:
    """The records of one call, after some others, with the L2 flushed."""
    (case,) = cases([preset(shape)], [tokens])
    layer = Layer(case.shape, tokens, device)
    inputs = make_inputs(case, device, weights=layer.weights)
    y = torch.empty(tokens, case.shape.hidden, dtype=torch.bfloat16, device=device)
    plan = layer.buffer.plan(tokens, variant, case.numerics, None)
    spec = replace(plan.kernel.spec, timeline=True)
    room = torch.zeros(words(plan.num_sms), dtype=torch.int64, device=device)
    kernel = BoundKernel(spec, layer.buffer.place, timeline=room.data_ptr())
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    for _ in range(ROUNDS):
        inputs.stage(layer.buffer)
        room.zero_()
        flush.zero_()
        layer.buffer.launch(
            replace(plan, kernel=kernel),
            y=y,
            tokens=tokens,
            l1=layer.l1,
            l2=layer.l2,
            stats=None,
            clamp=math.inf if case.clamp is None else case.clamp,
        )
        layer.buffer.check()
    records = decode(room.cpu())
    layer.buffer.destroy()
    return records


def main() -> int:
    """Run once, print the summary; 3 without a Hopper GPU."""
    arguments = parser(__doc__)
    arguments.add_argument("--shape", default="v4-flash")
    arguments.add_argument("--tokens", type=int, default=1024)
    arguments.add_argument("--variant", default="auto")
    arguments.add_argument("--trace", type=Path, help="write a Chrome/Perfetto trace")
    arguments.add_argument("--every", type=int, default=1, help="only every n-th block in the trace")
    options = arguments.parse_args()
    device = hopper(arguments)
    records = record(options.shape, options.tokens, options.variant, device)
    if options.trace:
        title = f"{torch.cuda.get_device_name()}: {options.shape}, {options.tokens} tokens"
        write_trace(options.trace, records, title, range(0, 1 << 16, options.every))
    lines = ["role         what                 count   median us  longest us  share"]
    lines += [
        f"{s['role']:12} {s['what']:20} {s['count']:5} {s['median_us']:11.2f} {s['longest_us']:11.2f} {s['share']:6.1%}"
        for s in summary(records)
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
