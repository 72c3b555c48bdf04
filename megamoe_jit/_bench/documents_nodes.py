"""What the JSON document of `bench --nodes` says, and its rows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from megamoe_jit._documents import Count, Document, Figure, Measured, Says

__all__ = ["BenchNodes", "NodesRow"]

OneOrMore = Annotated[int, Says(minimum=1)]


@dataclass(frozen=True, slots=True)
class NodesRow:
    """One call over several nodes; times are medians in microseconds, of the slowest rank.

    Attributes:
        shape: by name
        tokens: of each rank
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


@dataclass(frozen=True, slots=True)
class BenchNodes(Document):
    """Times of the layer over several nodes.

    Attributes:
        environment: card, driver, versions
        rows: of the cases, in the order in which they were measured
    """

    KIND: ClassVar[str] = "bench-nodes"

    environment: dict[str, Any]
    rows: tuple[NodesRow, ...]

    @classmethod
    def of(cls, found: dict[str, Any]) -> BenchNodes:
        """The document of what `measure_nodes.run` gave."""
        names = [field.name for field in fields(NodesRow)]
        return cls(
            found["environment"], tuple(NodesRow(**{name: row[name] for name in names}) for row in found["rows"])
        )
