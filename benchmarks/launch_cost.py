"""Host time of one steady-state call on a Hopper GPU: the launch alone, the public function, and an empty torch op.

    python -m benchmarks.launch_cost [--json]

The GPU work is as small as it gets and never fills the launch queue, so what is timed is the host.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping

import torch

import megamoe_jit as mm
from benchmarks.frame import hopper, parser, say
from megamoe_jit._check.scenarios import Scenario, make_inputs
from megamoe_jit._check.verify import buffer_sizes
from megamoe_jit._spec import MoEShape

ROUNDS, BATCH = 200, 10


def medians_us(calls: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, batch: int = BATCH) -> dict[str, float]:
    """Median host microseconds of each call, a batch of one between synchronisations, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            for _ in range(batch):
                begin = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return {name: statistics.median(found[len(found) // 4 :]) for name, found in times.items()}


def empty_op(device: torch.device | str) -> Callable[[], object]:
    """What any operation of torch costs the host at least: one on no elements."""
    nothing = torch.empty(0, dtype=torch.float32, device=device)
    return lambda: nothing.add_(1)


def measure() -> dict[str, float]:
    """Medians in microseconds."""
    shape = MoEShape(512, 512, 8, 2)
    inputs = make_inputs(Scenario("launch", shape, 1, 1), "cuda")
    l1, l2 = mm.transform_weights_for_mega_moe_sm90(inputs.l1, inputs.l2)
    buffer = mm.get_symm_buffer_for_mega_moe(None, *buffer_sizes(shape, 1))
    buffer.topk_idx.fill_(-1)
    y = torch.empty(1, shape.hidden, dtype=torch.bfloat16, device="cuda")
    mm.fp8_mega_moe(y, l1, l2, buffer)
    launcher = buffer.plan(1, None, True, None).kernel.launcher
    stream = torch.cuda.current_stream().cuda_stream
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    result = medians_us(
        {
            "launch_us": lambda: launcher.launch(sms, stream),
            "public_us": lambda: mm.fp8_mega_moe(y, l1, l2, buffer),
            "empty_torch_op_us": empty_op("cuda"),
            "one_element_torch_op_us": lambda: y[:1, :1].zero_(),
        }
    )
    buffer.check()
    buffer.destroy()
    return result


def main() -> int:
    """Measure and print; 3 without a Hopper GPU."""
    arguments = parser(__doc__)
    arguments.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options = arguments.parse_args()
    hopper(arguments)
    result = measure()
    for line in [json.dumps(result)] if options.json else [f"{k:24} {v:7.2f}" for k, v in result.items()]:
        say(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
