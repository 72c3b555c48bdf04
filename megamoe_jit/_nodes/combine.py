"""The sum over nodes: one node after the other, in FP32, so that a token has the same bits however its rows came."""

from __future__ import annotations

import torch

__all__ = ["sum_nodes"]


def sum_nodes(partials: torch.Tensor, y: torch.Tensor) -> None:
    """``y = partials[0] + partials[1] + ...``, each sum in FP32 and in that order, rounded once at the end.

    Args:
        partials: bf16 or float32 ``[nodes, rows, hidden]``, two nodes or more; zeros where a node has nothing.
        y: bf16 ``[tokens, hidden]`` of the first `tokens` rows, written.
    """
    parts = partials[:, : y.shape[0]]
    if len(parts) == 2:  # of bf16 too: torch adds these in FP32 and rounds once
        torch.add(parts[0], parts[1], out=y)
        return
    total = parts[0].float()
    for part in parts[1:-1]:
        total = torch.add(total, part)
    torch.add(total, parts[-1], out=y)
