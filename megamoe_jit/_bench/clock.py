"""The benchmark's clock on one GPU: calls that take turns, calls in a row, and what the card itself gives now."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")

WARMUP, TIMED = 3, 15  #: rounds
FLUSH_BYTES = 256 << 20  #: several times the L2
IDLE_CYCLES = 180_000  #: about 0.1 ms, spent by the GPU itself so that the launch is queued when it ends
SUSTAINED_S = 0.4
QUEUE_DEPTH = 32  #: launches kept in flight by the sustained loop
REST_S = 0.005  #: before each dense product of the anchor, so that the clock recovers: the card's burst rate


def _nothing() -> None:
    pass


def _rest() -> None:
    cuda: Any = torch.cuda
    cuda._sleep(IDLE_CYCLES)


@dataclass(frozen=True, slots=True)
class TimedCall:
    """Something to time: `run`, and what has to happen before each of its calls."""

    run: Callable[[], object]
    stage: Callable[[], object] = _nothing

    def staged(self) -> TimedCall:
        """The same with the staging inside what is timed."""

        def run() -> None:
            self.stage()
            self.run()

        return TimedCall(run)


def captured(call: Callable[[], T]) -> Callable[[], T]:
    """A replay of `call` as a CUDA graph; it gives what the captured call gave, which every replay writes.

    The replay keeps the call: a graph does not keep alive what it reads.
    """
    call()  # whatever is made on first use
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        kept = call, call()

    def replay() -> T:
        graph.replay()
        return kept[1]

    return replay


def record(call: TimedCall, before: Callable[[], object] = _nothing) -> tuple[Any, Any]:
    """Stage, do `before`, run: the events around the run."""
    cuda: Any = torch.cuda  # events are untyped in some releases
    begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    call.stage()
    before()
    begin.record()
    call.run()
    end.record()
    return begin, end


def second_half(pairs: Sequence[tuple[Any, Any]]) -> float:
    """Median microseconds of the later half of calls that follow each other; waits for the device."""
    torch.cuda.synchronize()
    times: list[float] = [begin.elapsed_time(end) * 1e3 for begin, end in pairs[len(pairs) // 2 :]]
    return statistics.median(times)


def burst(
    calls: Mapping[str, TimedCall],
    flush: torch.Tensor,
    idle: Callable[[], object] = _rest,
    *,
    warmup: int | None = None,
    timed: int | None = None,
) -> dict[str, list[float]]:
    """Microseconds of each timed round, the calls taking turns.

    Args:
        calls: what to time, by name.
        flush: uint8 ``[FLUSH_BYTES]`` on the device, written before each call.
        idle: what the GPU does between the flush and a call.
        warmup: rounds before those that count; `WARMUP` if None.
        timed: rounds that count; `TIMED` if None.
    """

    def before() -> None:
        flush.zero_()
        idle()

    skipped, counted = WARMUP if warmup is None else warmup, TIMED if timed is None else timed
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(skipped + counted):
        for name, call in calls.items():
            begin, end = record(call, before)
            end.synchronize()
            if turn >= skipped:
                times[name].append(begin.elapsed_time(end) * 1e3)
    return times


def sustained(call: TimedCall) -> float:
    """Median microseconds of a call while calls follow each other for 0.4 s; its second half counts."""
    pairs: list[tuple[Any, Any]] = []
    start = time.perf_counter()
    while time.perf_counter() - start < SUSTAINED_S:
        pairs.append(record(call))
        if len(pairs) > QUEUE_DEPTH:
            pairs[-QUEUE_DEPTH][1].synchronize()
    return second_half(pairs)


def anchors() -> dict[str, float]:
    """What the card itself gives now: dense FP8 8192^3 through cuBLAS, and a read of 4 GiB."""
    device = torch.device("cuda", torch.cuda.current_device())
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    size = 8192
    one = torch.ones((), dtype=torch.float32, device=device)
    drawn = (torch.randn(size, size, dtype=torch.float32, device=device) * 148 for _ in range(2))
    a, b = (values.clamp(-448, 448).to(torch.float8_e4m3fn) for values in drawn)
    data = torch.ones(1 << 30, dtype=torch.float32, device=device)

    def dense() -> object:
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    dense_us = statistics.median(burst({"": TimedCall(dense, lambda: time.sleep(REST_S))}, flush)[""])
    read_us = statistics.median(burst({"": TimedCall(data.sum)}, flush)[""])
    return {"dense_fp8_8192_tflops": 2e-6 * size**3 / dense_us, "read_4gib_tb_s": data.nbytes * 1e-6 / read_us}
