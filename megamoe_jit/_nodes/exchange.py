"""`Exchange`: how the rows of a call come to the ranks that have their experts, and results back.

What an exchange promises: no row is dropped; rows past the tokens of a rank matter to nobody; what one part of the
ranks gives for a token is summed slot by slot there. Those of this package sum the parts in one fixed order too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = ["Arrived", "Batch", "Exchange", "Rows"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows as kernels take them: views of a buffer, or of a part of it.

    Attributes:
        x: e4m3 ``[rows, hidden]``.
        x_sf: float32 ``[rows, hidden / 128]``.
        topk_idx: int64 ``[rows, topk]``.
        topk_weights: float32 ``[rows, topk]``.
    """

    x: torch.Tensor
    x_sf: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor

    def __getitem__(self, part: slice) -> Rows:
        if part.indices(len(self)) == (0, len(self), 1):
            return self  # views cost the host 10 us
        return Rows(*(tensor[part] for tensor in self.tensors))

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its tensors, in the order of the attributes."""
        return self.x, self.x_sf, self.topk_idx, self.topk_weights


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank sends in a call, or in a chunk of one.

    Attributes:
        rows: as many on every rank; those from `tokens` on are masked. Expert ids count all ranks' experts.
        tokens: of them, that are tokens of this rank.
    """

    rows: Rows
    tokens: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """What `dispatch` has brought into the buffer of the experts.

    Attributes:
        rows: of the call to come.
        num_rows: int32 or int64 ``[1]`` on the device, those of them that matter, where the host does not know it.
        batch: what was sent.
        state: what `combine` wants to know, of whatever kind.
    """

    rows: int
    num_rows: torch.Tensor | None
    batch: Batch
    state: Any = None


class Exchange(Protocol):
    """An engine that moves rows between ranks that share no memory.

    Attributes:
        name: for people.
        whole_node: experts are those of a node, whose kernel spans its ranks; else those of one rank.
        capturable: whether a call never waits on the host, and so fits into a CUDA graph.
        float32: whether results may travel in float32.
    """

    name: str
    whole_node: bool
    capturable: bool
    float32: bool

    def most_rows(self, tokens: int) -> int:
        """Rows that can arrive where every rank has at most so many tokens."""

    def dispatch(self, batch: Batch, into: Rows, first_expert: int, experts: int) -> Arrived:
        """Bring the rows of all ranks that need these experts into `into`, on the current stream.

        Args:
            batch: of this rank.
            into: the buffer of the experts, all of it.
            first_expert, experts: those that its kernel has. Ids arrive counted from the first; any other is masked.

        Returns:
            How many rows there are, as `combine` takes it.
        """

    def combine(self, arrived: Arrived, partial: torch.Tensor, y: torch.Tensor) -> None:
        """Bring results back and sum them, on the current stream.

        Args:
            arrived: as `dispatch` gave it.
            partial: bf16 or float32 ``[arrived.rows, hidden]``, what the kernel gave.
            y: bf16 ``[tokens, hidden]``, written.
        """
