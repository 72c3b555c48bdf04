"""Which exchange a call takes, in how many parts: what was asked for, or what the rule of `model` says."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megamoe_jit._errors import CaptureError
from megamoe_jit._nodes.along_rails import AlongRails
from megamoe_jit._nodes.exchange import Exchange
from megamoe_jit._nodes.model import NETWORK, Cost, Network, cost
from megamoe_jit._nodes.rail import TorchRail
from megamoe_jit._spec import MoEShape


@dataclass(frozen=True, slots=True)
class Rule:
    """What `cost` says of the calls of a layer."""

    shape: MoEShape  #: with all ranks' experts
    nodes: int
    ranks_per_node: int
    exchange: str = "auto"  #: or the one there is; one that `cost` does not know counts as "exact", to ranks, not nodes
    partial_bytes: int = 2  #: of a number of the results that travel
    network: Network = NETWORK  #: what rows travel over
    chunks: int | None = 1  #: of every call; None for the best, by its rows

    def __call__(self, rows: int, capturing: bool = False) -> Cost:
        """Of a call with so many rows on each rank."""
        more: dict[str, Any] = {"partial_bytes": self.partial_bytes, "network": self.network, "chunks": self.chunks}
        more["capturing"] = capturing
        if self.exchange in ("auto", "gather", "exact"):
            return cost(self.shape, self.nodes, self.ranks_per_node, rows, exchange=self.exchange, **more)
        return cost(self.shape, self.nodes * self.ranks_per_node, 1, rows, exchange="exact", **more)


class Choices:
    """The exchanges of a buffer, and what a call takes of them.

    Args:
        exchanges: one, or those that the rule chooses from by name.
        rail: that they use, None for one that brings its own ways.
        rule: of the layer.
    """

    def __init__(self, exchanges: Sequence[Exchange], rail: TorchRail | None, rule: Rule) -> None:
        self.exchanges, self.rail = {it.name: it for it in exchanges}, rail
        self.whole_node = exchanges[0].whole_node
        self._cut_by_rule = rule.chunks is None
        self._by_rule = functools.lru_cache(maxsize=1024)(rule)

    def most_rows(self, tokens: int) -> int:
        """Rows that can arrive where every rank has at most so many tokens."""
        return max(it.most_rows(tokens) for it in self.exchanges.values())

    def pick(self, rows: int, capturing: bool) -> Exchange:
        """That of a call with so many rows on each rank, which all ranks have alike."""
        if capturing and self.rail is not None:
            self.rail.captured = True
        if len(self.exchanges) > 1:
            return self.exchanges[self._by_rule(rows, capturing).exchange]
        (one,) = self.exchanges.values()
        if capturing and not one.capturable:
            raise CaptureError(
                f"exchange {one.name} cannot be captured in a CUDA graph; use 'gather' or 'auto' for calls that are"
            )
        return one

    def chunks(self, rows: int, capturing: bool, chunks: int, most: int) -> int:
        """Parts of such a call: at most `chunks`, which there is memory for, with at most `most` rows each."""
        if not self._cut_by_rule:
            return chunks
        return min(chunks, max(-(-rows // most), self._by_rule(rows, capturing).chunks))

    def prepare(self, device: torch.device) -> None:
        """Load what goes over rows that travel along a rail; raises `MegaMoeError` if a kernel cannot be had."""
        for exchange in self.exchanges.values():
            if isinstance(exchange, AlongRails):
                exchange.passes(device)

    def connect(self, device: torch.device) -> None:
        """Have the rail meet once: connections are made at first use, which no capture can wait for."""
        if self.rail is not None:
            nodes = self.rail.nodes
            one = torch.zeros(nodes, dtype=torch.int64, device=device)
            self.rail.counts(one)()
            self.rail.swap(torch.empty_like(one), one)

    def error(self, device: torch.device) -> str | None:
        """What the rail has noticed itself."""
        return None if self.rail is None else self.rail.error(device)

    def abort(self, device: torch.device) -> None:
        """End what is under way on the rail."""
        if self.rail is not None:
            self.rail.abort(device)
