"""Timing on several ranks: calls that all ranks make in the same order, aligned on the device."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from megamoe_jit._timing import FLUSH_BYTES, IDLE_CYCLES, TIMED, WARMUP, TimedCall

__all__ = ["RankTimer"]

ALIGN_CYCLES = 4 * IDLE_CYCLES  #: the GPU idles while the host queues the alignment and the call


class RankTimer:
    """Times calls that all ranks make in the same order."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.tiny = torch.zeros(1, device=device)
        self.cuda: Any = torch.cuda

    def _align(self) -> None:
        import torch.distributed as dist

        dist.all_reduce(self.tiny)

    def burst(self, calls: Mapping[str, TimedCall]) -> dict[str, list[float]]:
        """Microseconds of each timed call, the calls taking turns."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(WARMUP + TIMED):
            for name, call in calls.items():
                begin, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
                call.stage()
                self.flush.zero_()
                self.cuda._sleep(ALIGN_CYCLES)
                self._align()
                begin.record()
                call.run()
                end.record()
                end.synchronize()
                if turn >= WARMUP:
                    times[name].append(begin.elapsed_time(end) * 1e3)
        return times

    def sustained(self, call: TimedCall, count: int) -> float:
        """Median microseconds of `count` calls in a row, of the second half; the same count on all ranks."""
        pairs = []
        for _ in range(count):
            begin, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
            call.stage()
            begin.record()
            call.run()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        times: list[float] = [begin.elapsed_time(end) * 1e3 for begin, end in pairs[count // 2 :]]
        return statistics.median(times)
