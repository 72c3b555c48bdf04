"""What a call over several nodes adds to that of one: how rows travel and why, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

from megamoe_jit._documents import Count, Figure, Says
from megamoe_jit._errors import ConfigError
from megamoe_jit._nodes.model import check_launch_rows, cost, row_bytes, rows_per_token
from megamoe_jit._spec import FP8, MoEShape, WeightFormat
from megamoe_jit._text import counted

BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class Ways:
    """What is asked for of a call over nodes.

    Attributes:
        nodes: how many.
        exchange: "auto", "gather" or "exact".
        partial: "bf16" or "fp32".
        chunks: None for the rule.
    """

    nodes: int = 1
    exchange: str = "auto"
    partial: str = "bf16"
    chunks: int | None = None


ONE_NODE = Ways()


@dataclass(frozen=True, slots=True)
class Between:
    """How a call goes over several nodes. Times are modelled, not measured.

    Attributes:
        nodes: how many
        exchange: how rows travel
        partial: in which nodes send back what they have summed
        chunks: parts of the call
        launch_rows: rows of each launch of a node's rank; in the exact form on average
        most_rows: that its buffer has room for
        sent_bytes: to other nodes, of each rank
        exchange_us: modelled, of what travels
        kernel_us: modelled, of the launches
        total_us: modelled, of the call
        staging_bytes: memory of this rank's tokens, and of results that are not summed yet
        reasons: why this exchange and so many chunks
    """

    nodes: Annotated[int, Says(minimum=2)]
    exchange: str
    partial: str
    chunks: Count
    launch_rows: Count
    most_rows: Count
    sent_bytes: Count
    exchange_us: Figure
    kernel_us: Figure
    total_us: Figure
    staging_bytes: Count
    reasons: tuple[str, ...]


def shape_of_a_node(shape: MoEShape, nodes: int, ranks: int) -> MoEShape:
    """What a kernel of one of several nodes has: its part of the experts, and no shared ones, which are run apart.

    Args:
        shape: the layer, with all ranks' experts.
        nodes: two or more.
        ranks: of a node.

    Raises:
        ConfigError: the ranks do not share the experts evenly.
    """
    if shape.experts % (nodes * ranks):
        where = f"on {nodes} nodes of {counted(ranks, 'rank')}"
        raise ConfigError(f"{shape.experts} experts {where}; allowed: a multiple of {nodes * ranks}")
    return replace(shape.routed, experts=shape.experts // nodes)


def between(
    shape: MoEShape, tokens: int, ranks: int, ways: Ways, weights: WeightFormat = FP8
) -> tuple[MoEShape, Between]:
    """The layer of one node, and what is between it and the others.

    Args:
        shape: the layer, with all ranks' experts.
        tokens: of each rank, padded.
        ranks: of a node.
        ways: what is asked for, with two nodes or more.
        weights: the format of the weights.

    Raises:
        ConfigError: the ranks do not share the experts evenly, or a launch would have more rows than there can be.
    """
    nodes, of_a_node = ways.nodes, shape_of_a_node(shape, ways.nodes, ranks)
    shape = shape.routed
    found = cost(
        shape, nodes, ranks, tokens,
        exchange=ways.exchange, chunks=ways.chunks, partial_bytes=BYTES[ways.partial], weights=weights,
    )  # fmt: skip
    step = -(-tokens // found.chunks)
    most = nodes * step
    check_launch_rows(most, tokens, nodes, found.chunks)
    share = 1.0 if found.exchange == "gather" else rows_per_token("exact", nodes, shape) / (nodes - 1)
    lanes = min(found.chunks, 2)
    partials = 2 * lanes * most * shape.hidden * BYTES[ways.partial]  # what a node gives, and what comes back
    return of_a_node, Between(
        nodes=nodes,
        exchange=found.exchange,
        partial=ways.partial,
        chunks=found.chunks,
        launch_rows=math.ceil(most * share),
        most_rows=most,
        sent_bytes=math.ceil(found.sent_bytes),
        exchange_us=found.exchange_us,
        kernel_us=found.kernel_us,
        total_us=found.total_us,
        staging_bytes=tokens * row_bytes(shape) + partials,
        reasons=found.reasons,
    )
