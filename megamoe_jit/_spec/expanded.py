"""The memory in which a variant that expands packed weights has them while a call runs."""

from __future__ import annotations

from typing import NamedTuple

from megamoe_jit._spec.abi import BLOCK_N
from megamoe_jit._spec.formats import FP8_E5M2

__all__ = ["ExpandedParts"]


class ExpandedParts(NamedTuple):
    """Bytes of its parts, one behind the other."""

    first: int  #: e5m2 codes of the first matrices
    second: int  #: and of the second ones
    counters: int  #: of what is expanded: u32, one for each column of tiles

    @classmethod
    def of(cls, hidden: int, intermediate: int, experts: int) -> ExpandedParts:
        """Of so many experts on one rank."""
        columns = 2 * intermediate // BLOCK_N + -(-hidden // BLOCK_N)
        first = FP8_E5M2.code_bytes(2 * intermediate, hidden)
        return cls(experts * first, experts * FP8_E5M2.code_bytes(hidden, intermediate), experts * columns * 4)
