"""What measurements on several ranks share: a clock for calls that all ranks make in the same order, aligned on the
device; a rank's part of the weights; how what ranks found is collected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import megamoe_jit
from megamoe_jit._bench.clock import FLUSH_BYTES, IDLE_CYCLES, TimedCall, burst, record, second_half
from megamoe_jit._check.collect import collect
from megamoe_jit._check.scenarios import Weights, make_weights
from megamoe_jit._check.spawn import World
from megamoe_jit._check.verify_ranks import share_of
from megamoe_jit._spec import FP8, MoEShape, WeightFormat
from megamoe_jit.heuristics.presets import Preset

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


def sizes_of(each: Preset) -> list[Any]:
    """Name, hidden, intermediate, one rank's experts and top-k, as they travel to the ranks."""
    return [each.name, each.shape.hidden, each.shape.intermediate, each.local_experts, each.shape.topk]


def shape_on_ranks(world: World, hidden: int, intermediate: int, local: int, topk: int) -> MoEShape:
    """The layer whose ranks have `local` experts each."""
    return MoEShape(hidden, intermediate, local * world.ranks, topk)


class RankWeights:
    """The weights of a shape: all experts' for the reference, and this rank's as drawn and as the kernel takes them."""

    def __init__(self, world: World, shape: MoEShape, weights: str = FP8.name) -> None:
        self.world, self.shape, self.device = world, shape, world.device
        self.format = WeightFormat.parse(weights)
        self.weights = make_weights(shape, world.device, 0, self.format)
        both = self.weights.l1, self.weights.l2
        self.own = Weights(*(share_of(given, shape, world.rank, world.ranks) for given in both))
        self.own_shape = replace(shape, experts=shape.experts // world.ranks)
        self.l1, self.l2 = megamoe_jit.transform_weights_for_mega_moe_sm90(self.own.l1, self.own.l2)


def measured_on_ranks(
    target: str, ranks: int, arguments: Mapping[str, Any], note: Callable[[Any], None]
) -> dict[str, Any] | None:
    """What `target` finds on ranks of torchrun if there is one, else on ranks started here.

    Args:
        target: as in `collect`; gives `environment`, `anchors` and more.
        ranks: how many GPUs.
        arguments: as in `collect`.
        note: called with each row that rank 0 reports, as it comes.

    Returns:
        What rank 0 gave, with the anchors of the slowest card, and the rows; None on the ranks of torchrun that have
        nothing to say.

    Raises:
        ConfigError: there are not as many GPUs.
        MegaMoeError: a rank failed; says what all of them said.
    """
    rows: list[Any] = []

    def add(_: int, row: Any) -> None:
        rows.append(row)
        note(row)

    ends = collect(target, ranks, arguments, on_report=add)
    if ends is None:
        return None
    conditions = {**ends[0]["environment"], "ranks": ranks}
    return {**ends[0], "environment": conditions, "anchors": slowest_anchors(ends), "rows": rows}
