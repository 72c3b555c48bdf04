"""The exact form: a row goes to the nodes that have experts for it, once to each. The host waits for the counts."""

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

    places: torch.Tensor  #: int64 ``[sent]``: node * tokens + token of each row that was sent, ascending
    leaving: list[int]  #: rows to each node
    arriving: list[int]  #: rows from each node


class ExactExchange(AlongRails):
    """Rows packed by node, in one collective after that of the counts; results back in a third."""

    name = "exact"
    capturable = False

    def dispatch(self, batch: Batch, into: Rows, first_expert: int, experts: int) -> Arrived:
        sent, tokens = self._sent(batch, experts)
        rows = sum(sent.arriving)
        mine = [_words(tensor)[tokens] for tensor in batch.rows.tensors]
        arriving = into[:rows]
        theirs = [_words(tensor) for tensor in arriving.tensors]
        widths = [words.shape[1] for words in mine]
        packed = torch.cat(mine, dim=1)
        unpacked = packed.new_empty(rows, sum(widths))
        self.rail.swap(unpacked, packed, sent.arriving, sent.leaving)
        for words, part in zip(theirs, torch.split(unpacked, widths, dim=1), strict=True):
            words.copy_(part)
        if first_expert:
            arriving.topk_idx.sub_(first_expert)
        return Arrived(rows, None, batch, sent)

    def _sent(self, batch: Batch, experts: int) -> tuple[_Sent, torch.Tensor]:
        """What goes where, agreed with the other nodes, and the tokens that are sent, in the order of packing."""
        nodes, ids = self.rail.nodes, batch.rows.topk_idx[: batch.tokens]
        real = (ids >= 0) & (ids < nodes * experts)
        node = torch.where(real, torch.div(ids, experts, rounding_mode="floor"), -1)
        wanted = torch.stack([(node == other).any(dim=1) for other in range(nodes)])
        counts = self.rail.counts(wanted.sum(dim=1))
        places = wanted.view(-1).nonzero().view(-1)
        here = self.rail.node
        sent = _Sent(places, counts[here], [theirs[here] for theirs in counts])
        return sent, places % max(1, batch.tokens)

    def combine(self, arrived: Arrived, partial: torch.Tensor, y: torch.Tensor) -> None:
        sent, tokens = arrived.state, arrived.batch.tokens
        back = partial.new_empty(len(sent.places), partial.shape[1])
        self.rail.swap(back, partial, sent.leaving, sent.arriving)
        # zeros where nothing was sent, as a node gives them for tokens that are not for it
        spread = partial.new_zeros(self.rail.nodes * tokens, partial.shape[1])
        spread[sent.places] = back
        sum_nodes(spread.view(self.rail.nodes, tokens, partial.shape[1]), y)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Rows as int32, which copies faster than bytes do."""
    return tensor.view(torch.int32)
