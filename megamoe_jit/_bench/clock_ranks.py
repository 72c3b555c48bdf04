"""Timing on several ranks: calls that all ranks make in the same order, aligned on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megamoe_jit._bench.clock import FLUSH_BYTES, IDLE_CYCLES, TimedCall, burst, record, second_half

__all__ = ["RankTimer", "slowest_anchors"]

ALIGN_CYCLES = 4 * IDLE_CYCLES  #: the GPU idles while the host queues the alignment and the call


class RankTimer:
    """Times calls that all ranks make in the same order.

    Args:
        device: the GPU.
        ahead: cycles that it idles before the ranks are aligned: how far the host is ahead of it when a call begins.
    """

    def __init__(self, device: torch.device, ahead: int = ALIGN_CYCLES) -> None:
        self.ahead = ahead
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.tiny = torch.zeros(1, dtype=torch.float32, device=device)
        self.cuda: Any = torch.cuda

    def _align(self) -> None:
        import torch.distributed as dist

        self.cuda._sleep(self.ahead)
        dist.all_reduce(self.tiny)

    def burst(
        self, calls: Mapping[str, TimedCall], *, warmup: int | None = None, timed: int | None = None
    ) -> dict[str, list[float]]:
        """Microseconds of each timed call, the calls taking turns; rounds as in `clock.burst`."""
        return burst(calls, self.flush, self._align, warmup=warmup, timed=timed)

    def sustained(self, call: TimedCall, count: int) -> float:
        """Median microseconds of `count` calls in a row, of the second half; the same count on all ranks."""
        return second_half([record(call) for _ in range(count)])


def slowest_anchors(ends: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Of what ranks measured with `clock.anchors`, each time all of them, the figures of the slowest card.

    Args:
        ends: what each rank gave: `anchors`, as often for all.
    """
    return [
        {name: min(card[name] for card in cards) for name in cards[0]}
        for cards in zip(*(e["anchors"] for e in ends), strict=True)
    ]
