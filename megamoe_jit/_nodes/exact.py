"""The exact form: a row goes to the nodes that have experts for it, once to each. The host waits for the counts.

What the host enqueues after that wait, nothing hides: so all that does not need the counts comes before, the packing of
rows too, and what comes after is few launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamoe_jit._nodes.exchange import Arrived, Batch, Rows
from megamoe_jit._nodes.passes import Routes
from megamoe_jit._nodes.rail import AlongRails

__all__ = ["ExactExchange"]


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
