"""The exact form: a row goes to the nodes that have experts for it, once to each. The host waits for the counts.

What the host enqueues after that wait, nothing hides: so all that does not need the counts comes before, and what does
is few launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from megamoe_jit._nodes.combine import sum_nodes
from megamoe_jit._nodes.exchange import Arrived, Batch, Rows
from megamoe_jit._nodes.rail import AlongRails

__all__ = ["ExactExchange"]


@dataclass(frozen=True, slots=True)
class _Sent:
    """What went where."""

    wanted: torch.Tensor  #: bool ``[nodes * tokens]``: whether the node has experts for the token
    so_far: torch.Tensor  #: int64 ``[nodes * tokens]``: how many of them up to here
    leaving: list[int]  #: rows to each node
    arriving: list[int]  #: rows from each node


class ExactExchange(AlongRails):
    """Rows packed by node, in one collective after that of the counts; results back in a third."""

    name = "exact"
    capturable = False

    def dispatch(self, batch: Batch, into: Rows, first_expert: int, experts: int) -> Arrived:
        mine = [_words(tensor) for tensor in batch.rows[: batch.tokens].tensors]
        widths = [words.shape[1] for words in mine]
        every_row = torch.cat(mine, dim=1)
        sent, tokens = self._sent(batch, experts)
        rows = sum(sent.arriving)
        unpacked = every_row.new_empty(rows, every_row.shape[1])
        self.rail.swap(unpacked, every_row.index_select(0, tokens), sent.arriving, sent.leaving)
        arriving = into[:rows]
        theirs = [_words(tensor) for tensor in arriving.tensors]
        torch._foreach_copy_(theirs, torch.split(unpacked, widths, dim=1))
        if first_expert:
            arriving.topk_idx.sub_(first_expert)
        return Arrived(rows, None, batch, sent)

    def _sent(self, batch: Batch, experts: int) -> tuple[_Sent, torch.Tensor]:
        """What goes where, agreed with the other nodes, and the tokens that are sent, in the order of packing."""
        nodes, here, tokens = self.rail.nodes, self.rail.node, batch.tokens
        ids = batch.rows.topk_idx[:tokens]
        node = torch.div(ids, experts, rounding_mode="floor")  # no node's number where it is no expert's
        numbers = torch.arange(nodes * tokens + 1, dtype=torch.int64, device=ids.device)
        every_node = numbers[:nodes].view(-1, 1, 1)
        wanted = (node == every_node).any(dim=2).view(-1)
        so_far = wanted.cumsum(0)
        until = so_far[tokens - 1 :: tokens].contiguous() if tokens else so_far.new_zeros(nodes)
        # of the first row that is sent, the second and so on; past the last one whatever
        token = torch.searchsorted(so_far, numbers[1:]) % max(1, tokens)
        counts = [[b - a for a, b in pairwise((0, *theirs))] for theirs in self.rail.counts(until)]
        sent = _Sent(wanted, so_far, counts[here], [theirs[here] for theirs in counts])
        return sent, token[: sum(sent.leaving)]

    def combine(self, arrived: Arrived, partial: torch.Tensor, y: torch.Tensor) -> None:
        sent, tokens, hidden = arrived.state, arrived.batch.tokens, partial.shape[1]
        rows = sum(sent.leaving)
        back = partial.new_empty(rows + 1, hidden)
        self.rail.swap(back[:rows], partial, sent.leaving, sent.arriving)
        back[rows].zero_()  # where nothing was sent, as a node gives them for tokens that are not for it
        every_place = back[torch.where(sent.wanted, sent.so_far - 1, rows)]
        sum_nodes(every_place.view(self.rail.nodes, tokens, hidden), y)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Rows as int32, which copies faster than bytes do."""
    return tensor.view(torch.int32)
