"""How long a layer takes, as a formula: which variant to take for a shape that nobody measured.

A variant needs its head, and then whatever is longer, the tiles or the stream of weights, with a soft corner where the
two are alike.  Its four constants are fitted to one GPU's measurements (`megamoe-jit tune --write-table`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megamoe_jit._spec import BLOCK, MoEShape, Variant
from megamoe_jit._spec.abi import BLOCK_N

__all__ = ["Model", "Sample", "expected_blocks", "expected_us", "fit"]

CORNER = 4.0  #: of the soft maximum; larger is sharper
TURNS = 400  #: of the fit


@dataclass(frozen=True, slots=True)
class Model:
    """The constants of one variant on one GPU; all above zero."""

    head_us: float  #: sorting, the first rows, the end
    tile_us: float  #: of one block for each tile, beside its k-blocks
    k_block_us: float  #: of one block for 128 of depth of a tile
    stream_tb_s: float  #: at which the weights of touched experts arrive


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement."""

    shape: MoEShape  #: with the experts of one rank
    tokens: int
    num_sms: int
    median_us: float


def expected_blocks(shape: MoEShape, tokens: int, block_m: int) -> float:
    """Blocks of `block_m` rows of all experts together, on average over random routing to different experts.

    Args:
        shape: with the experts of one rank.
        tokens: of one rank.
        block_m: rows of a tile.
    """
    share = min(1.0, shape.topk / shape.experts)
    mean = tokens * share
    touched = 1.0 - (1.0 - share) ** tokens
    spread = math.sqrt(max(mean * (1.0 - share), 1e-9) * 2.0)
    # An expert has a block more with each `block_m` rows: sum the chances that it has more than 0, 1, 2, ... blocks.
    last = int((mean + 5.0 * spread) / block_m)
    sure = max(1, int((mean - 5.0 * spread) / block_m))
    more = sum(0.5 * math.erfc((j * block_m + 0.5 - mean) / spread) for j in range(sure, last + 1))
    return shape.experts * (touched * (1.0 + (sure - 1)) + more)


def expected_us(model: Model, shape: MoEShape, tokens: int, variant: Variant, num_sms: int) -> float:
    """Microseconds of a call.

    Args:
        model: of the variant on the GPU.
        shape: with the experts of one rank.
        tokens: of one rank.
        variant: gives the rows of a tile.
        num_sms: blocks of the launch.
    """
    wide1, wide2 = 2 * shape.intermediate / BLOCK_N, -(-shape.hidden // BLOCK_N)
    deep = (wide1 * shape.hidden + wide2 * shape.intermediate) / BLOCK
    blocks = expected_blocks(shape, tokens, variant.block_m)
    tiles_us = blocks * (deep * model.k_block_us + (wide1 + wide2) * model.tile_us) / num_sms
    touched = shape.experts * (1.0 - (1.0 - min(1.0, shape.topk / shape.experts)) ** tokens)
    stream_us = 3.0 * touched * shape.hidden * shape.intermediate * 1e-6 / model.stream_tb_s
    return model.head_us + float((tiles_us**CORNER + stream_us**CORNER) ** (1.0 / CORNER))


def fit(samples: Sequence[Sample], variant: Variant) -> tuple[Model, float]:
    """The model of a variant for measured times.

    Returns:
        The model, and the largest factor by which it is off a sample.
    """

    def errors(values: Sequence[float]) -> list[float]:
        model = Model(*values)
        return [
            math.log(expected_us(model, s.shape, s.tokens, variant, s.num_sms) / s.median_us)
            for s in samples
            if s.tokens > 0
        ]

    def cost(values: Sequence[float]) -> float:
        return sum(error * error for error in errors(values))

    best, step = [20.0, 1.0, 0.4, 4.0], 1.5
    least = cost(best)
    for _ in range(TURNS):
        before = least
        for index in range(len(best)):
            for factor in (step, 1.0 / step):
                tried = [*best[:index], best[index] * factor, *best[index + 1 :]]
                found = cost(tried)
                if found < least:
                    best, least = tried, found
        if least == before:
            step = math.sqrt(step)
        if step < 1.0005:
            break
    return Model(*best), math.exp(max((abs(error) for error in errors(best)), default=0.0))
