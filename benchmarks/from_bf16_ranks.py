"""The layer from bf16 to bf16 on several ranks of one host: what `from_bf16 --ranks N` measures on each of them.

Every GPU has an eighth of the experts, and its tokens go to the experts of all ranks.  The layer is what serving
engines call, `mega_moe_from_bf16` on a buffer of the group.  A row's figure is that of the rank which took longest.
"""

from __future__ import annotations

from typing import Any

import torch

import megamoe_jit as mm
from benchmarks.from_bf16 import CLAMP, part_of, row_of
from megamoe_jit._bench.clock import anchors
from megamoe_jit._bench.conditions import environment
from megamoe_jit._bench.measure import kernel_of, require_hopper, some_rows
from megamoe_jit._bench.on_ranks import RankTimer, RankWeights, shape_on_ranks
from megamoe_jit._check.scenarios import Scenario, make_inputs
from megamoe_jit._check.spawn import World
from megamoe_jit._check.verify import buffer_sizes
from megamoe_jit._layer.from_bf16 import mega_moe_from_bf16
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.group import gather
from megamoe_jit._spec import MoEShape


class _Layer(RankWeights):
    """A shape on this rank: weights and the group's buffer."""

    def __init__(self, world: World, shape: MoEShape, max_tokens: int, weights: str) -> None:
        import torch.distributed as dist

        super().__init__(world, shape, weights)
        sizes = buffer_sizes(shape, max_tokens)
        self.buffer = mm.get_symm_buffer_for_mega_moe(dist.group.WORLD, *sizes, device=world.device)
        self.buffer.prepare_all(weight_format=weights)

    @property
    def parts(self) -> tuple[WeightTensors, WeightTensors, mm.SymmBuffer]:
        """As a call takes them."""
        return self.l1, self.l2, self.buffer


def _row(world: World, timer: RankTimer, case: Scenario, layer: _Layer) -> dict[str, Any]:
    import torch.distributed as dist

    inputs = make_inputs(case, world.device, world.rank, layer.weights)

    def whole() -> torch.Tensor:
        batch = inputs.x, inputs.topk_idx, inputs.topk_weights
        return mega_moe_from_bf16(*batch, *layer.parts, activation_clamp=CLAMP)

    part = part_of(inputs, some_rows(case, inputs, layer.weights), layer.parts, whole, timer.burst)
    kernel = kernel_of(case.shape, case.tokens, "auto", world.device, world.ranks, case.weights)
    return row_of(case, kernel, gather(dist.group.WORLD, part))


def measure_on_rank(world: World, shapes: list[list[Any]], tokens: list[int]) -> dict[str, Any]:
    """What each rank does: all cases, in the same order; rank 0 reports each row when all ranks have it.

    Args:
        world: this rank's place.
        shapes: name, hidden, intermediate, experts of a rank, slots and weight format of each layer.
        tokens: of each rank, ascending.
    """
    require_hopper()
    conditions, card = environment(), [anchors()]
    timer = RankTimer(world.device)
    for name, *sizes, weights in shapes:
        torch.cuda.empty_cache()
        layer = _Layer(world, shape_on_ranks(world, *sizes), tokens[-1], weights)
        for count in tokens:
            row = _row(world, timer, Scenario(name, layer.shape, count, count, weights=weights), layer)
            if world.rank == 0:
                world.report(row)
        layer.buffer.destroy()
        del layer
    return {"environment": conditions, "anchors": [*card, anchors()]}
