"""Weights as e4m3 codes with a float scale for 128 x 128 of them: the order in which the kernel reads them.

*Gate and up rows alternate by eights* in ``w13``: ``g0..7, u0..7, g8..15, u8..15, ...``. So the first GEMM has gate and
up of one intermediate channel in the same tile, and in the same thread.

*Tiles are stored as shared memory holds them*, in both matrices: 256 rows (the last tile may have 128) by 128 columns,
one after the other along the columns, then the next 256 rows. A block streams its weights from consecutive addresses,
by plain bulk copies. Inside such a tile the sixteen bytes of row r and columns 16c to 16c + 15 lie at

    128 r + 16 (c ^ r % 8)

which is the 128-byte swizzle that the tensor cores read without bank conflicts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megamoe_jit._layer.quantize import dequantize_weights as dequantize
from megamoe_jit._spec import BLOCK
from megamoe_jit._spec.abi import BLOCK_N

__all__ = ["INTERLEAVE", "dequantize", "pack", "unpack"]

INTERLEAVE = 8  #: rows of gate, then rows of up, in one group
TILE_ROWS = BLOCK_N  #: of a tile; the last may have half
ATOM_ROWS, ATOM_CHUNKS, CHUNK_BYTES = 8, 8, 16  #: of the swizzle


def _interleave(w: torch.Tensor) -> torch.Tensor:
    """``[2I, H]`` gate rows first, to groups of eight; always a new tensor."""
    rows, hidden = w.shape
    halves = w.reshape(2, rows // (2 * INTERLEAVE), INTERLEAVE, hidden)
    return halves.transpose(0, 1).contiguous().view(rows, hidden)


def _deinterleave(w: torch.Tensor) -> torch.Tensor:
    """Inverse of `_interleave`; always a new tensor."""
    rows, hidden = w.shape
    groups = w.reshape(rows // (2 * INTERLEAVE), 2, INTERLEAVE, hidden)
    return groups.transpose(0, 1).contiguous().view(rows, hidden)


def _by_tile(order: Callable[[torch.Tensor, int], torch.Tensor], w: torch.Tensor) -> torch.Tensor:
    """`order` of the whole tiles, and of the rows that are left; ``[N, K]`` to a new ``[N, K]``."""
    whole = w.shape[0] // TILE_ROWS * TILE_ROWS
    parts = [order(w[:whole], TILE_ROWS)] if whole else []
    if whole < w.shape[0]:
        parts.append(order(w[whole:], w.shape[0] - whole))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _swizzle(tiles: torch.Tensor) -> torch.Tensor:
    """``[..., row of the atom, chunk, byte]`` with chunks in the order of shared memory, or back: its own inverse."""
    row = torch.arange(ATOM_ROWS, dtype=torch.int64, device=tiles.device).unsqueeze(1)
    chunk = torch.arange(ATOM_CHUNKS, dtype=torch.int64, device=tiles.device)
    return tiles[..., row, row ^ chunk, :]


def _pack_tiles(w: torch.Tensor, height: int) -> torch.Tensor:
    """Tiles of `height` rows as shared memory holds them."""
    rows, depth = w.shape
    atoms = w.reshape(-1, height // ATOM_ROWS, ATOM_ROWS, depth // BLOCK, ATOM_CHUNKS, CHUNK_BYTES)
    return _swizzle(atoms.permute(0, 3, 1, 2, 4, 5)).reshape(rows, depth)


def _unpack_tiles(w: torch.Tensor, height: int) -> torch.Tensor:
    """Inverse of `_pack_tiles`."""
    rows, depth = w.shape
    atoms = w.reshape(-1, depth // BLOCK, height // ATOM_ROWS, ATOM_ROWS, ATOM_CHUNKS, CHUNK_BYTES)
    return _swizzle(atoms).permute(0, 2, 3, 1, 4, 5).reshape(rows, depth)


def pack(codes: torch.Tensor, gated: bool) -> torch.Tensor:
    """See `WeightFormat.pack`."""
    return _by_tile(_pack_tiles, _interleave(codes) if gated else codes)


def unpack(codes: torch.Tensor, gated: bool) -> torch.Tensor:
    """See `WeightFormat.unpack`."""
    plain = _by_tile(_unpack_tiles, codes)
    return _deinterleave(plain) if gated else plain
