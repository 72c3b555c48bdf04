"""The exact form: a row goes to the nodes that have experts for it, once to each. The host waits for the counts.

What the host enqueues after that wait, nothing hides: so all that does not need the counts comes before, the packing of
rows too, and what comes after is one collective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamoe_jit._nodes.combine import sum_nodes
from megamoe_jit._nodes.exchange import Arrived, Batch, Rows
from megamoe_jit._nodes.rail import AlongRails

__all__ = ["ExactExchange"]


@dataclass(frozen=True, slots=True)
class _Sent:
    """What went where."""

    places: torch.Tensor  #: int64 ``[nodes * tokens]``: its row in what comes back, from 1 on; 0 where nothing was sent
    leaving: list[int]  #: rows to each node
    arriving: list[int]  #: rows from each node


class ExactExchange(AlongRails):
    """Rows packed by node, in one collective after that of the counts; results back in a third."""

    name = "exact"
    capturable = False

    def dispatch(self, batch: Batch, into: Rows, first_expert: int, experts: int) -> Arrived:
        mine = batch.rows[: batch.tokens]
        wanted = _wanted(mine.topk_idx, self.rail.nodes, experts)
        counts = self.rail.counts(wanted.sum(dim=1))
        so_far = wanted.view(-1).cumsum(0)
        packed = _packed(mine, so_far, self.rail.nodes)
        places = so_far * wanted.view(-1)
        counted, here = counts(), self.rail.node
        sent = _Sent(places, counted[here], [theirs[here] for theirs in counted])
        arriving, leaving = into[: sum(sent.arriving)], sum(sent.leaving)
        self.rail.swap(arriving.tensors, [tensor[:leaving] for tensor in packed], sent.arriving, sent.leaving)
        if first_expert:
            arriving.topk_idx.sub_(first_expert)
        return Arrived(len(arriving), None, batch, sent)

    def combine(self, arrived: Arrived, partial: torch.Tensor, y: torch.Tensor) -> None:
        sent, tokens, hidden = arrived.state, arrived.batch.tokens, partial.shape[1]
        back = partial.new_empty(1 + sum(sent.leaving), hidden)
        back[0].zero_()  # where nothing was sent, as a node gives them for tokens that are not for it
        self.rail.swap([back[1:]], [partial], sent.leaving, sent.arriving)
        sum_nodes(back[sent.places].view(self.rail.nodes, tokens, hidden), y)


def _wanted(ids: torch.Tensor, nodes: int, experts: int) -> torch.Tensor:
    """bool ``[nodes, tokens]``: whether a node, which has so many experts, has one for the token."""
    node = torch.div(ids, experts, rounding_mode="floor")  # no node's number where it is no expert's
    every_node = torch.arange(nodes, dtype=torch.int64, device=ids.device).view(-1, 1, 1)
    return (node == every_node).any(dim=2)


def _packed(mine: Rows, so_far: torch.Tensor, nodes: int) -> list[torch.Tensor]:
    """The tensors of the rows to node 0, then of those to node 1 and so on, as int32; behind them whatever.

    Args:
        mine: the tokens.
        so_far: int64 ``[nodes * tokens]``: rows to send up to here.
        nodes: how many. A token goes to no more of them than it has slots.
    """
    tokens, slots = mine.topk_idx.shape
    number = torch.arange(1, tokens * min(nodes, slots) + 1, dtype=torch.int64, device=so_far.device)
    token = torch.searchsorted(so_far, number) % max(1, tokens)
    return [tensor.view(torch.int32).index_select(0, token) for tensor in mine.tensors]
