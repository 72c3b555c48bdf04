"""Rows of a matrix in the order of tiles, which all weight formats share; what lies inside a tile is a format's own.

*Gate and up rows alternate by eights* in ``w13``: ``g0..7, u0..7, g8..15, u8..15, ...``. So the first GEMM has gate and
up of one intermediate channel in the same tile, and in the same thread. A tile has 256 rows, the last one maybe 128.
"""

from __future__ import annotations

from collections.abc import Callable

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


def by_tile(order: Callable[[torch.Tensor, int], torch.Tensor], w: torch.Tensor) -> torch.Tensor:
    """`order` of the whole tiles, and of the rows that are left; ``[rows, bytes of a row]`` to a new tensor."""
    whole = w.shape[0] // TILE_ROWS * TILE_ROWS
    parts = [order(w[:whole], TILE_ROWS)] if whole else []
    if whole < w.shape[0]:
        parts.append(order(w[whole:], w.shape[0] - whole))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
