"""Rows of `bench --nodes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megamoe_jit._documents import Count, Figure, Measured, Says

OneOrMore = Annotated[int, Says(minimum=1)]


@dataclass(frozen=True, slots=True)
class NodesRow:
    """One call over several nodes; times are medians in microseconds, of the slowest rank.

    Attributes:
        shape: by name
        tokens: of each rank
        weights: the format that they are stored in
        nodes: how many
        ranks_per_node: GPUs of each
        exchange: how rows travelled
        partial: what nodes sent back
        chunks: parts of the call
        whole_us: the whole call
        kernel_us: the launch of a node alone; null in chunks
        exchange_us: dispatch and combine without the launch; null in chunks
        rest_us: what the whole takes beside both
        modelled_us: the same call by the model, over a network that this was not
        sent_bytes: by the model, to other nodes, of each rank
        diff: of the output to the reference
        correct: within the bounds of `verify`
        baseline: the fastest unfused method
        baseline_us: its time
        baseline_speedup: how many times as fast the whole call is
    """

    shape: str
    tokens: Count
    weights: str
    nodes: OneOrMore
    ranks_per_node: OneOrMore
    exchange: str
    partial: Annotated[str, Says(enum=["bf16", "fp32"])]
    chunks: OneOrMore
    whole_us: Figure
    kernel_us: float | None
    exchange_us: float | None
    rest_us: float | None
    modelled_us: Figure
    sent_bytes: Count
    diff: Measured
    correct: bool
    baseline: str | None
    baseline_us: float | None
    baseline_speedup: float | None
