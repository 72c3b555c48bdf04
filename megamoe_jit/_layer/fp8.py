"""Weights as eight-bit codes with a float scale for 128 x 128 of them: the order in which the kernel reads them.

Rows go by `tiles`. *Tiles are stored as shared memory holds them*, in both matrices: 256 rows (the last tile may have
128) by 128 columns, one after the other along the columns, then the next 256 rows. A block streams its weights from
consecutive addresses, by plain bulk copies. Inside such a tile the sixteen bytes of row r and columns 16c to 16c + 15
lie at

    128 r + 16 (c ^ r % 8)

which is the 128-byte swizzle that the tensor cores read without bank conflicts.
"""

from __future__ import annotations

import torch

from megamoe_jit._layer.quantize import dequantize_weights as dequantize
from megamoe_jit._layer.tiles import TileOrder

__all__ = ["dequantize", "pack", "unpack"]

ATOM_ROWS, ATOM_CHUNKS, CHUNK_BYTES = 8, 8, 16  #: of the swizzle
#: tile, k-block, atom, row of the atom, chunk, byte
_ORDER = TileOrder((ATOM_ROWS,), (ATOM_CHUNKS, CHUNK_BYTES), (0, 3, 1, 2, 4, 5))


def _swizzle(tiles: torch.Tensor) -> torch.Tensor:
    """Chunks of each atom in the order of shared memory, or back: its own inverse; always a new tensor."""
    row = torch.arange(ATOM_ROWS, dtype=torch.int64, device=tiles.device).unsqueeze(1)
    chunk = torch.arange(ATOM_CHUNKS, dtype=torch.int64, device=tiles.device)
    return tiles.reshape(-1, ATOM_ROWS, ATOM_CHUNKS, CHUNK_BYTES)[:, row, row ^ chunk].reshape(tiles.shape)


def pack(codes: torch.Tensor, gated: bool) -> torch.Tensor:
    """See `WeightFormat.pack`."""
    return _swizzle(_ORDER.pack(codes, gated))


def unpack(codes: torch.Tensor, gated: bool) -> torch.Tensor:
    """See `WeightFormat.unpack`."""
    return _ORDER.unpack(_swizzle(codes), gated)
