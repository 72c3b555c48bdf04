"""How far the layer is from its parts alone, on this card and under the same protocol.

    python -m benchmarks.floor --shapes v4-flash,v4-pro --tokens 64,1024,8192 [--output floor.json]

Beside the layer, in turns within the same rounds:

    weights    a kernel that reads the weights of the touched experts once and does nothing else
    products   two dense FP8 products of the layer's size through cuBLAS: all rows by one expert's matrices, one scale
               for a whole tensor.  Neither gathers, nor scales by blocks, nor has borders between experts.

Whatever takes both can hardly be faster than the slower of the two.  Needs a Hopper GPU.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import torch
from cuda.bindings import driver

from benchmarks.frame import asked, keep, parser, rows_by_shape, say
from megamoe_jit._bench.clock import FLUSH_BYTES, TimedCall, anchors, burst
from megamoe_jit._bench.measure import DEFAULT_TOKENS, Layer
from megamoe_jit._check.scenarios import Scenario, make_inputs
from megamoe_jit._compile.nvrtc import compile_source
from megamoe_jit._compile.toolchain import find_toolchain
from megamoe_jit._device.driver import checked
from megamoe_jit.reference import expert_counts

SHAPES = ("v4-flash", "v4-pro", "mimo-v2.5", "mimo-v2.5-pro")
THREADS, BLOCKS_PER_SM = 512, 4
PIECE_BYTES = THREADS * 4 * 16  #: that a block of threads reads at a time: four vectors each

SOURCE = """
extern "C" __global__ void __launch_bounds__(512) read_weights(
    const uint4* first, const uint4* second, const int* experts, unsigned count,
    unsigned pieces1, unsigned pieces2, unsigned* sink) {
    const unsigned each = pieces1 + pieces2;
    unsigned seen = 0;
    for (unsigned i = blockIdx.x; i < count * each; i += gridDim.x) {
        const unsigned long long e = experts[i / each];
        const unsigned piece = i % each;
        const uint4* from = piece < pieces1 ? first + (e * pieces1 + piece) * 2048
                                            : second + (e * pieces2 + piece - pieces1) * 2048;
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(v[j].x), "=r"(v[j].y), "=r"(v[j].z), "=r"(v[j].w) : "l"(from + j * 512 + threadIdx.x));
#pragma unroll
        for (int j = 0; j < 4; ++j) seen |= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (seen == 0x12345678) *sink = seen;   // hardly ever; the loads are needed for it
}
"""


class ReadWeights:
    """Reads the weights of some experts; holds its module for the life of the process."""

    def __init__(self, device: torch.device) -> None:
        cubin = compile_source(SOURCE, kernel_name="read_weights", toolchain=find_toolchain()).cubin
        module = checked(driver, driver.cuModuleLoadData(cubin), "cuModuleLoadData")
        self._kernel = checked(driver, driver.cuModuleGetFunction(module, b"read_weights"), "cuModuleGetFunction")
        self._grid = torch.cuda.get_device_properties(device).multi_processor_count * BLOCKS_PER_SM
        self._sink = torch.zeros(1, dtype=torch.int32, device=device)

    def call(self, first: torch.Tensor, second: torch.Tensor, experts: torch.Tensor) -> Callable[[], object]:
        """A call that reads `experts` int32 ``[N]`` of both weights ``[experts, ...]``, of one byte an element."""
        per_expert = [weight[0].nbytes for weight in (first, second)]
        if any(size % PIECE_BYTES for size in per_expert):
            raise SystemExit(f"an expert's matrices have {per_expert} bytes, not multiples of {PIECE_BYTES}")
        values = (
            first.data_ptr(), second.data_ptr(), experts.data_ptr(), len(experts),
            *(size // PIECE_BYTES for size in per_expert), self._sink.data_ptr(),
        )  # fmt: skip
        kinds = (ctypes.c_void_p,) * 3 + (ctypes.c_uint32,) * 3 + (ctypes.c_void_p,)
        stream = torch.cuda.current_stream().cuda_stream

        def call() -> object:
            return checked(
                driver,
                driver.cuLaunchKernel(self._kernel, self._grid, 1, 1, THREADS, 1, 1, 0, stream, (values, kinds), 0),
                "cuLaunchKernel",
            )

        return call


def products(case: Scenario, device: torch.device) -> Callable[[], object]:
    """Two dense products with as many multiplications as the layer."""
    shape = case.shape
    rows = -(-case.tokens * shape.topk // 16) * 16
    one = torch.ones((), device=device)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)

    pairs = [
        (matrix(rows, shape.hidden), matrix(2 * shape.intermediate, shape.hidden).t()),
        (matrix(rows, shape.intermediate), matrix(shape.hidden, shape.intermediate).t()),
    ]

    def call() -> object:
        return [
            torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
            for a, b in pairs
        ]

    return call


def measure(case: Scenario, layer: Layer, read: ReadWeights, flush: torch.Tensor) -> dict[str, Any]:
    """One row: medians in microseconds of the layer and of what it is compared with."""
    device = layer.device
    inputs = make_inputs(case, device, weights=layer.weights)
    y = torch.empty(case.tokens, case.shape.hidden, dtype=torch.bfloat16, device=device)
    touched = expert_counts(inputs.topk_idx, case.shape.experts).nonzero().flatten().int()
    calls = {
        "layer": TimedCall(layer.call("auto", y, case), lambda: inputs.stage(layer.buffer)),
        "weights": TimedCall(read.call(layer.l1[0], layer.l2[0], touched)),
        "products": TimedCall(products(case, device)),
    }
    times = {name: statistics.median(values) for name, values in burst(calls, flush).items()}
    layer.buffer.check()
    return {
        "shape": case.name,
        "tokens": case.tokens,
        "experts_touched": len(touched),
        **{f"{name}_us": round(value, 2) for name, value in times.items()},
        "of_slower_part": round(times["layer"] / max(times["weights"], times["products"]), 4),
    }


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['shape']:15} {row['tokens']:6} {row['layer_us']:9.1f} {row['weights_us']:8.1f} "
        f"{row['products_us']:9.1f} {row['of_slower_part']:9.2f}"
    )


def main() -> int:
    """Measure and print; 3 without a Hopper GPU."""
    wanted = asked(parser(__doc__), SHAPES, DEFAULT_TOKENS)
    before = anchors()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=wanted.device)
    read = ReadWeights(wanted.device)
    say(f"{'layer':15} {'tokens':>6} {'layer us':>9} {'weights':>8} {'products':>9} {'of slower':>9}")
    rows = rows_by_shape(
        wanted.presets,
        wanted.tokens,
        lambda shape, most: closing(Layer(shape, most, wanted.device)),
        lambda case, layer: measure(case, layer, read, flush),
        _line,
    )
    keep("floor", wanted.output, anchors=[before, anchors()], rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
