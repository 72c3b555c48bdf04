"""The two exchanges that bring rows to a node's kernel along rails.

The gather form: every node gets every row. Static, so that it fits into a CUDA graph; for few tokens and nodes.

The exact form: a row goes to the nodes that have experts for it, once to each. The host waits for the counts. Nothing
hides what the host enqueues after that wait: so all that does not need the counts comes before, the packing of rows
too, and what comes after is few launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamoe_jit._nodes.exchange import Arrived, Batch, Rows
from megamoe_jit._nodes.pass_kernels import PassKernels, pass_kernels
from megamoe_jit._nodes.passes import Routes, TorchPasses
from megamoe_jit._nodes.rail import TorchRail


class AlongRails:
    """What both have in common."""

    whole_node = True
    float32 = True

    def __init__(self, rail: TorchRail) -> None:
        self.rail = rail

    def most_rows(self, tokens: int) -> int:
        """Rows of a launch, at most, where each rank has so many tokens."""
        return self.rail.nodes * tokens

    def passes(self, device: torch.device) -> TorchPasses | PassKernels:
        """What goes over the rows there; raises `MegaMoeError` if a kernel of it cannot be had."""
        return pass_kernels(device) if device.type == "cuda" else TorchPasses()


class GatherExchange(AlongRails):
    """All rows of a rail into the experts' buffer as they are, in one collective; results back in another.

    Rows of node m are rows ``m * rows`` to ``(m + 1) * rows`` there. A node masks what is not for its experts by
    subtracting the first of them: to a kernel, an id that is no expert is masked.
    """

    name = "gather"
    capturable = True

    def dispatch(self, batch: Batch, into: Rows, first_expert: int, experts: int) -> Arrived:
        rows = self.rail.nodes * len(batch.rows)
        arriving = into[:rows]
        self.rail.gather(arriving.tensors, batch.rows.tensors)
        if first_expert:
            arriving.topk_idx.sub_(first_expert)
        return Arrived(rows, None, batch)

    def combine(self, arrived: Arrived, partial: torch.Tensor, y: torch.Tensor) -> None:
        back = torch.empty_like(partial)
        self.rail.swap(back, partial)
        self.passes(back.device).sum_nodes(back, y, self.rail.nodes)


@dataclass(frozen=True, slots=True)
class _Sent:
    """What went where."""

    routes: Routes
    leaving: list[int]  #: rows to each node
    arriving: list[int]  #: rows from each node


class ExactExchange(AlongRails):
    """Rows packed by node, in one collective after that of the counts; results back in a third."""

    name = "exact"
    capturable = False

    def dispatch(self, batch: Batch, into: Rows, first_expert: int, experts: int) -> Arrived:
        passes = self.passes(batch.rows.x.device)
        routes = passes.route(batch.rows.topk_idx[: batch.tokens], self.rail.nodes, experts)
        counts = self.rail.counts(routes.counts)
        packed = passes.pack(batch.rows, routes)
        counted, here = counts(), self.rail.node
        sent = _Sent(routes, counted[here], [theirs[here] for theirs in counted])
        rows = sum(sent.arriving)
        arrived = packed.new_empty(rows, packed.shape[1])
        self.rail.swap(arrived, packed[: sum(sent.leaving)], sent.arriving, sent.leaving)
        passes.unpack(arrived, into, first_expert)
        return Arrived(rows, None, batch, sent)

    def combine(self, arrived: Arrived, partial: torch.Tensor, y: torch.Tensor) -> None:
        sent = arrived.state
        back = partial.new_empty(sum(sent.leaving), partial.shape[1])
        self.rail.swap(back, partial, sent.leaving, sent.arriving)
        self.passes(back.device).sum_nodes(back, y, self.rail.nodes, sent.routes)
