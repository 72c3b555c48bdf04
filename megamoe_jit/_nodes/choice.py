"""Which exchange a call takes: the one that was asked for, or what the rule of `model` says."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from megamoe_jit._errors import CaptureError
from megamoe_jit._nodes.exchange import Exchange
from megamoe_jit._nodes.model import cost
from megamoe_jit._nodes.rail import TorchRail
from megamoe_jit._spec import MoEShape

__all__ = ["Choices"]


class Choices:
    """The exchanges of a buffer.

    Args:
        exchanges: one, or those that the rule chooses from by name.
        rail: that they use, None for one that brings its own ways.
        shape: the layer.
        ranks_per_node: ranks of a node.
        partial_bytes: of a number of the results that travel.
    """

    def __init__(
        self,
        exchanges: Sequence[Exchange],
        rail: TorchRail | None,
        shape: MoEShape,
        ranks_per_node: int,
        partial_bytes: int,
    ) -> None:
        self.exchanges, self.rail = {it.name: it for it in exchanges}, rail
        self.whole_node = exchanges[0].whole_node
        self._shape, self._ranks_per_node, self._partial_bytes = shape, ranks_per_node, partial_bytes
        self._by_rule = functools.lru_cache(maxsize=1024)(self._rule)

    def most_rows(self, tokens: int) -> int:
        """Rows that can arrive where every rank has at most so many tokens."""
        return max(it.most_rows(tokens) for it in self.exchanges.values())

    def pick(self, rows: int, capturing: bool) -> Exchange:
        """That of a call with so many rows on each rank, which all ranks have alike."""
        if capturing and self.rail is not None:
            self.rail.captured = True
        if len(self.exchanges) > 1:
            return self.exchanges[self._by_rule(rows, capturing)]
        (one,) = self.exchanges.values()
        if capturing and not one.capturable:
            raise CaptureError(
                f"exchange {one.name} cannot be captured in a CUDA graph; use 'gather' or 'auto' for calls that are"
            )
        return one

    def _rule(self, rows: int, capturing: bool) -> str:
        assert self.rail is not None
        more = {"partial_bytes": self._partial_bytes, "capturing": capturing}
        return cost(self._shape, self.rail.nodes, self._ranks_per_node, rows, **more).exchange  # type: ignore[arg-type]

    def connect(self, device: torch.device) -> None:
        """Have the rail meet once: connections are made at first use, which no capture can wait for."""
        if self.rail is not None:
            nodes = self.rail.nodes
            one = torch.zeros(nodes, dtype=torch.int64, device=device)
            self.rail.counts(one)
            self.rail.swap(torch.empty_like(one), one)

    def error(self, device: torch.device) -> str | None:
        """What the rail has noticed itself."""
        return None if self.rail is None else self.rail.error(device)

    def abort(self, device: torch.device) -> None:
        """End what is under way on the rail."""
        if self.rail is not None:
            self.rail.abort(device)
