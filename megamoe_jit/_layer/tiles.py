"""Rows of a matrix in the order of tiles, which all weight formats share; what lies inside a tile is a format's own.

*Gate and up rows alternate by eights* in ``w13``: ``g0..7, u0..7, g8..15, u8..15, ...``. So the first GEMM has gate and
up of one intermediate channel in the same tile, and in the same thread. A tile has 256 rows, the last one maybe 128.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch

from megamoe_jit._spec.abi import BLOCK_N

INTERLEAVE = 8  #: rows of gate, then rows of up, in one group
TILE_ROWS = BLOCK_N  #: of a tile; the last may have half


def interleave(w: torch.Tensor) -> torch.Tensor:
    """``[2I, bytes of a row]`` gate rows first, to groups of eight; always a new tensor."""
    rows, width = w.shape
    halves = w.reshape(2, rows // (2 * INTERLEAVE), INTERLEAVE, width)
    return halves.transpose(0, 1).contiguous().view(rows, width)


def deinterleave(w: torch.Tensor) -> torch.Tensor:
    """Inverse of `interleave`; always a new tensor."""
    rows, width = w.shape
    groups = w.reshape(rows // (2 * INTERLEAVE), 2, INTERLEAVE, width)
    return groups.transpose(0, 1).contiguous().view(rows, width)


class TileOrder(NamedTuple):
    """How the bytes of a tile follow each other: its dimensions in another order.

    Rows are cut into groups, and columns into k-blocks; both are cut further, so that a matrix is
    ``[tile, group, *rows, k-block, *columns]``.
    """

    rows: tuple[int, ...]  #: sizes that a group of rows is cut into
    columns: tuple[int, ...]  #: those of the bytes of a row in a k-block
    order: tuple[int, ...]  #: the dimensions as they lie in memory

    def pack(self, w: torch.Tensor, gated: bool) -> torch.Tensor:
        """A matrix ``[rows, bytes of a row]`` in this order, gate and up rows in turns if it is `gated`."""
        return _by_tile(self._packed, interleave(w) if gated else w)

    def unpack(self, w: torch.Tensor, gated: bool) -> torch.Tensor:
        """Inverse of `pack`."""
        plain = _by_tile(self._unpacked, w)
        return deinterleave(plain) if gated else plain

    def _sizes(self, height: int, width: int) -> list[int]:
        return [-1, height // prod(self.rows), *self.rows, width // prod(self.columns), *self.columns]

    def _packed(self, w: torch.Tensor, height: int) -> torch.Tensor:
        return w.reshape(self._sizes(height, w.shape[1])).permute(self.order).reshape(w.shape)

    def _unpacked(self, w: torch.Tensor, height: int) -> torch.Tensor:
        sizes, back = self._sizes(height, w.shape[1]), sorted(range(len(self.order)), key=self.order.__getitem__)
        return w.reshape([sizes[dimension] for dimension in self.order]).permute(back).reshape(w.shape)


def _by_tile(order: Callable[[torch.Tensor, int], torch.Tensor], w: torch.Tensor) -> torch.Tensor:
    """`order` of the whole tiles, and of the rows that are left, with the height of such a tile."""
    whole = w.shape[0] // TILE_ROWS * TILE_ROWS
    parts = [order(w[:whole], TILE_ROWS)] if whole else []
    if whole < w.shape[0]:
        parts.append(order(w[whole:], w.shape[0] - whole))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
