"""What measurements on several ranks share: a rank's part of the weights, and how what ranks found is collected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import megamoe_jit
from megamoe_jit._bench.clock_ranks import slowest_anchors
from megamoe_jit._check.collect import collect
from megamoe_jit._check.scenarios import Weights, make_weights
from megamoe_jit._check.spawn import World
from megamoe_jit._check.verify_ranks import share_of
from megamoe_jit._spec import FP8, MoEShape, WeightFormat
from megamoe_jit.heuristics.presets import Preset


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
        note: called with what rank 0 reports, as it comes.

    Returns:
        What rank 0 gave, with the anchors of the slowest card; None on the ranks of torchrun that have nothing to say.

    Raises:
        ConfigError: there are not as many GPUs.
        MegaMoeError: a rank failed; says what all of them said.
    """
    ends = collect(target, ranks, arguments, on_report=lambda _, report: note(report))
    if ends is None:
        return None
    conditions = {**ends[0]["environment"], "ranks": ranks}
    return {**ends[0], "environment": conditions, "anchors": slowest_anchors(ends)}
