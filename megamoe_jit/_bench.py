"""Time the layer on this GPU by the protocol of `benchmarks/README.md`.

Each row is one shape (one GPU's slice of a model's experts), one token count and one variant.  Before a row
is timed, its output is compared with the FP32 reference.  Variants take turns within the same rounds, and the
card's own speed is measured in the same run: a dense FP8 product and a large read, before and after.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import megamoe_jit
from megamoe_jit._errors import UnsupportedDeviceError
from megamoe_jit._scenarios import Inputs, Scenario, make_inputs, make_weights
from megamoe_jit._settings import get_settings
from megamoe_jit._spec import MoEShape, Variant
from megamoe_jit._verify import Verdict, judge
from megamoe_jit.heuristics.presets import Preset
from megamoe_jit.heuristics.select import AUTO, choose
from megamoe_jit.reference import expert_counts, moe_reference

__all__ = [
    "DEFAULT_SHAPES",
    "DEFAULT_TOKENS",
    "VARIANTS",
    "Row",
    "anchors",
    "cases",
    "measure",
    "require_hopper",
]

DEFAULT_SHAPES = ("v4-flash", "v4-pro", "mimo-v2.5", "mimo-v2.5-pro")
DEFAULT_TOKENS = (16, 64, 256, 512, 1024, 4096, 8192)
VARIANTS = (AUTO, *(variant.value for variant in Variant))

WARMUP, TIMED = 3, 15
FLUSH_BYTES = 256 << 20  #: several times the L2
IDLE_CYCLES = 180_000  #: about 0.1 ms, spent by the GPU itself so that the launch is queued when it ends
SUSTAINED_S = 0.4
QUEUE_DEPTH = 32  #: launches kept in flight by the sustained loop
CHECKED_TOKENS = 64  #: rows compared with the reference; they reach every expert of the default shapes


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured for one case and variant; times in microseconds."""

    shape: str
    hidden: int
    intermediate: int
    experts: int
    topk: int
    tokens: int
    variant: str  #: as asked for
    kernel: str  #: the variant that ran
    median_us: float
    min_us: float
    max_us: float
    sustained_us: float
    diff: float
    worst_row_diff: float
    correct: bool
    tflops: float
    weights_tb_s: float  #: bytes of touched weights over the median time

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def require_hopper() -> torch.device:
    """The current CUDA device; raises `UnsupportedDeviceError` unless it is a Hopper."""
    if not torch.cuda.is_available():
        raise UnsupportedDeviceError("no CUDA device that PyTorch can use; this command needs a Hopper GPU (SM90)")
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        name = torch.cuda.get_device_name(device)
        raise UnsupportedDeviceError(f"{name} has compute capability {major}.{minor}; this command needs 9.0 (Hopper)")
    return device


def cases(presets: Iterable[Preset], tokens: Sequence[int]) -> list[Scenario]:
    """One GPU's slice of every preset (its experts over its ranks) at every token count."""
    return [
        Scenario(
            name=p.name,
            shape=MoEShape(p.shape.hidden, p.shape.intermediate, p.local_experts, p.shape.topk),
            tokens=count,
            capacity=count,
        )
        for p in presets
        for count in tokens
    ]


def _burst(
    calls: Mapping[str, Callable[[], object]], stage: Callable[[], object], flush: torch.Tensor
) -> dict[str, list[float]]:
    """Microseconds of each timed call, the calls taking turns."""
    cuda: Any = torch.cuda  # events are untyped in some releases
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARMUP + TIMED):
        for name, call in calls.items():
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            stage()
            flush.zero_()
            cuda._sleep(IDLE_CYCLES)
            begin.record()
            call()
            end.record()
            end.synchronize()
            if turn >= WARMUP:
                times[name].append(begin.elapsed_time(end) * 1e3)
    return times


def _sustained(call: Callable[[], object], stage: Callable[[], object]) -> float:
    """Median microseconds of a call while calls follow each other for 0.4 s; its second half counts."""
    cuda: Any = torch.cuda
    pairs: list[tuple[Any, Any]] = []
    start = time.perf_counter()
    while time.perf_counter() - start < SUSTAINED_S:
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        stage()
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
        if len(pairs) > QUEUE_DEPTH:
            pairs[-QUEUE_DEPTH][1].synchronize()
    torch.cuda.synchronize()
    times: list[float] = [begin.elapsed_time(end) * 1e3 for begin, end in pairs[len(pairs) // 2 :]]
    return statistics.median(times)


def anchors() -> dict[str, float]:
    """What the card itself gives now: dense FP8 8192^3 through cuBLAS, and a read of 4 GiB."""
    device = require_hopper()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    size = 8192
    one = torch.ones((), device=device)
    a, b = ((torch.randn(size, size, device=device) * 148).clamp(-448, 448).to(torch.float8_e4m3fn) for _ in range(2))
    data = torch.ones(1 << 30, dtype=torch.float32, device=device)

    def dense() -> object:
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    # 5 ms of rest let the clock recover: this is the card's burst rate.
    dense_us = statistics.median(_burst({"": dense}, lambda: time.sleep(0.005), flush)[""])
    read_us = statistics.median(_burst({"": data.sum}, lambda: None, flush)[""])
    return {
        "dense_fp8_8192_tflops": 2e-6 * size**3 / dense_us,
        "read_4gib_tb_s": data.nbytes * 1e-6 / read_us,
    }


class _Layer:
    """Weights and buffer of one shape on the device, and what is done with them."""

    def __init__(self, shape: MoEShape, max_tokens: int, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self.weights = make_weights(shape, device)
        self.l1, self.l2 = megamoe_jit.transform_weights_for_mega_moe_sm90(self.weights.l1, self.weights.l2)
        self.buffer = megamoe_jit.get_symm_buffer_for_mega_moe(
            None, shape.experts, max_tokens, shape.topk, shape.hidden, shape.intermediate
        )

    def stage(self, inputs: Inputs) -> None:
        tokens = inputs.x_q.shape[0]
        self.buffer.x[:tokens].copy_(inputs.x_q)
        self.buffer.x_sf[:tokens].copy_(inputs.x_sf)
        self.buffer.topk_idx[:tokens].copy_(inputs.topk_idx)
        self.buffer.topk_weights[:tokens].copy_(inputs.topk_weights)

    def call(self, variant: str, y: torch.Tensor, case: Scenario) -> Callable[[], object]:
        name = "fp8_mega_moe" if variant == AUTO else f"fp8_mega_moe_{Variant.parse(variant).value}"
        function = getattr(megamoe_jit, name)

        def call() -> object:
            return function(y, self.l1, self.l2, self.buffer, activation_clamp=case.clamp, fast_math=case.fast_math)

        return call

    def check(self, case: Scenario, inputs: Inputs, call: Callable[[], object], y: torch.Tensor) -> Verdict:
        """Judge some rows of one call; every row depends on its own token alone."""
        count = min(CHECKED_TOKENS, case.tokens)
        where = torch.linspace(0, case.tokens - 1, count, dtype=torch.float64, device=self.device).long()
        expected = moe_reference(
            inputs.x_q.view(torch.uint8)[where].view(torch.float8_e4m3fn),
            inputs.x_sf[where],
            inputs.topk_idx[where],
            inputs.topk_weights[where],
            self.weights.l1,
            self.weights.l2,
            activation_clamp=case.clamp,
        )
        y.fill_(float("nan"))
        self.stage(inputs)
        call()
        return judge(y[where], expected)


def _measure(layer: _Layer, case: Scenario, variants: Sequence[str], flush: torch.Tensor) -> list[Row]:
    shape, settings = case.shape, get_settings()
    inputs = make_inputs(case, layer.device, weights=layer.weights)
    y = torch.empty(case.tokens, shape.hidden, dtype=torch.bfloat16, device=layer.device)
    calls = {name: layer.call(name, y, case) for name in variants}
    verdicts = {name: layer.check(case, inputs, call, y) for name, call in calls.items()}
    times = _burst(calls, lambda: layer.stage(inputs), flush)
    flops = 6.0 * case.tokens * shape.topk * shape.hidden * shape.intermediate
    weight_bytes = (
        3.0 * int((expert_counts(inputs.topk_idx, shape.experts) > 0).sum()) * shape.hidden * shape.intermediate
    )
    rows = []
    for name, call in calls.items():
        picked = choose(
            shape,
            case.tokens,
            variant=settings.variant if name == AUTO else name,
            cooperative_threshold=settings.cooperative_threshold,
        )
        median = statistics.median(times[name])
        rows.append(
            Row(
                shape=case.name,
                **asdict(shape),
                tokens=case.tokens,
                variant=name,
                kernel=picked.variant.value,
                median_us=median,
                min_us=min(times[name]),
                max_us=max(times[name]),
                sustained_us=_sustained(call, lambda: layer.stage(inputs)),
                diff=verdicts[name].diff,
                worst_row_diff=verdicts[name].worst_row_diff,
                correct=verdicts[name].passed,
                tflops=flops * 1e-6 / median,
                weights_tb_s=weight_bytes * 1e-6 / median,
            )
        )
    return rows


def measure(
    work: Sequence[Scenario],
    variants: Sequence[str] = VARIANTS,
    progress: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure all of `work` on the current CUDA device.

    Args:
        work: Cases; those of one shape share weights and buffer.
        variants: Names from `VARIANTS`.
        progress: Called with each row as it is measured.

    Raises:
        UnsupportedDeviceError: There is no Hopper GPU.
    """
    device = require_hopper()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    rows: list[Row] = []
    for name, shape in dict.fromkeys((case.name, case.shape) for case in work):
        group = [case for case in work if (case.name, case.shape) == (name, shape)]
        torch.cuda.empty_cache()
        layer = _Layer(shape, max(case.capacity for case in group), device)
        try:
            for case in group:
                for row in _measure(layer, case, variants, flush):
                    rows.append(row)
                    if progress is not None:
                        progress(row)
        finally:
            layer.buffer.destroy()
        del layer
    torch.cuda.empty_cache()
    return rows
