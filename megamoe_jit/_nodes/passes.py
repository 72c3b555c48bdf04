"""Passes over the rows that travel between nodes, as they are defined.

Packed rows lie by node, and by token within it; all that a row is lies side by side, as int32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamoe_jit._nodes.exchange import Rows


@dataclass(frozen=True, slots=True)
class Routes:
    """Which node has experts for which token."""

    places: torch.Tensor  #: int32 ``[nodes, tokens]``: which of the node's rows is the token's, from 1 on; 0 for none
    counts: torch.Tensor  #: int64 ``[nodes]``: rows of each


class TorchPasses:
    """The passes by torch: what they are defined to do, and how a CPU does them; `PassKernels` are those of a GPU.

    All tensors are on one device.
    """

    def route(self, ids: torch.Tensor, nodes: int, experts: int) -> Routes:
        """Where tokens go, by their ids, int64 ``[tokens, topk]``, on nodes with so many experts each."""
        node = torch.div(ids, experts, rounding_mode="floor")  # no node's number where it is no expert's
        every_node = torch.arange(nodes, dtype=torch.int64, device=ids.device).view(-1, 1, 1)
        wanted = (node == every_node).any(dim=2)
        return Routes((wanted.cumsum(dim=1) * wanted).int(), wanted.sum(dim=1))

    def pack(self, rows: Rows, routes: Routes) -> torch.Tensor:
        """Of rows that begin with the tokens, those to node 0, then to node 1 and so on: int32 ``[most, words]``."""
        tokens = routes.places.shape[1]
        whole = torch.cat([_words(tensor) for tensor in rows[:tokens].tensors], dim=1)
        return torch.cat([whole[places > 0] for places in routes.places])

    def unpack(self, packed: torch.Tensor, into: Rows, first_expert: int) -> None:
        """Packed rows into the first ones of a buffer, with ids counted from this expert on."""
        arrived = into[: len(packed)]
        parts = [_words(tensor) for tensor in arrived.tensors]
        torch._foreach_copy_(parts, torch.split(packed, [part.shape[1] for part in parts], dim=1))
        arrived.topk_idx.sub_(first_expert)

    def sum_nodes(self, back: torch.Tensor, y: torch.Tensor, nodes: int, routes: Routes | None = None) -> None:
        """The sum over nodes: one after the other, in FP32, rounded once at the end, however the rows came.

        Args:
            back: bf16 or float32 ``[rows, hidden]``: what came of node 0, then of node 1 and so on; two nodes or more.
            y: bf16 ``[tokens, hidden]``, written.
            nodes: how many.
            routes: what was sent to each; zeros come of the others. Without them as many rows are of each node, and the
                first of these are the tokens'.
        """
        if routes is None:
            parts = [part[: y.shape[0]] for part in torch.split(back, len(back) // nodes)]
        else:
            zeros, each = back.new_zeros(1, back.shape[1]), torch.split(back, routes.counts.tolist())
            parts = [torch.cat((zeros, part))[places] for part, places in zip(each, routes.places, strict=True)]
        total = parts[0].float()
        for part in parts[1:]:
            total = torch.add(total, part)
        y.copy_(total)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32)
