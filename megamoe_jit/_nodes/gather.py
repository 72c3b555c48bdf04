"""The gather form: every node gets every row. Static, so that it fits into a CUDA graph; for few tokens and nodes."""

from __future__ import annotations

import torch

from megamoe_jit._nodes.exchange import Arrived, Batch, Rows
from megamoe_jit._nodes.rail import AlongRails


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
