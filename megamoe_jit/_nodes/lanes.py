"""What one chunk of a call works in: a lane. One is enough where chunks follow each other, two where they overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamoe_jit._nodes.exchange import Arrived, Exchange, Rows
from megamoe_jit._nodes.experts import Experts
from megamoe_jit._spec import BLOCK, MoEShape

__all__ = ["Dispatched", "Lane", "staging"]


@dataclass(frozen=True, slots=True)
class Dispatched:
    """A batch under way: what `MultiNodeBuffer.dispatch` gives, and `compute` and `combine` take, in that order.

    Attributes:
        exchange: how its rows have come.
        arrived: what they are.
        lane: in which of the buffer's memories.
    """

    exchange: Exchange
    arrived: Arrived
    lane: Lane


class Lane:
    """Memory of one chunk under way: the experts' buffer, and what they give.

    Attributes:
        experts: with the buffer that rows arrive in.
        partial: bf16 or float32 ``[rows, hidden]``.
        busy: a batch has arrived, and was not computed yet.
    """

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        self.experts = experts
        rows, hidden = experts.rows.x.shape
        with torch.inference_mode(False):
            self.partial = torch.empty(rows, hidden, dtype=dtype, device=experts.rows.x.device)
        self.busy = False


def staging(shape: MoEShape, rows: int, device: torch.device) -> Rows:
    """Memory for the tokens of one rank, all masked."""
    with torch.inference_mode(False):
        return Rows(
            torch.zeros(rows, shape.hidden, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn),
            torch.zeros(rows, shape.hidden // BLOCK, dtype=torch.float32, device=device),
            torch.full((rows, shape.topk), -1, dtype=torch.int64, device=device),
            torch.zeros(rows, shape.topk, dtype=torch.float32, device=device),
        )
