"""What a call over several nodes adds to that of one: how rows travel and why, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

from megamoe_jit._documents import Count, Figure, Says
from megamoe_jit._errors import ConfigError
from megamoe_jit._nodes.model import cost, row_bytes, rows_per_token
from megamoe_jit._spec import FP8, MAX_TOKENS, MoEShape, WeightFormat

__all__ = ["Between", "Ways", "between"]

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
    nodes, everyone = ways.nodes, ways.nodes * ranks
    if shape.experts % everyone:
        raise ConfigError(f"{shape.experts} experts on {nodes} nodes of {ranks} ranks; allowed: evenly")
    if shape.shared:
        shape = shape.routed  # those are run apart
    found = cost(
        shape, nodes, ranks, tokens,
        exchange=ways.exchange, chunks=ways.chunks, partial_bytes=BYTES[ways.partial], weights=weights,
    )  # fmt: skip
    step = -(-tokens // found.chunks)
    most = nodes * step
    if most > MAX_TOKENS:
        given = f"{tokens} tokens on {nodes} nodes in {found.chunks} chunk(s) are {most} rows of a launch"
        raise ConfigError(f"{given}; allowed: at most {MAX_TOKENS} (more chunks have fewer each)")
    share = 1.0 if found.exchange == "gather" else rows_per_token("exact", nodes, shape) / (nodes - 1)
    lanes = min(found.chunks, 2)
    partials = 2 * lanes * most * shape.hidden * BYTES[ways.partial]  # what a node gives, and what comes back
    return replace(shape, experts=shape.experts // nodes), Between(
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
