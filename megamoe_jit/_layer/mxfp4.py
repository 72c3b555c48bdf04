"""Weights as e2m1 codes, two to a byte, with an exponent for 32 of a row: the order in which the kernel reads them.

A code is ``s mmm``: the sign above the index of 0, 0.5, 1, 1.5, 2, 3, 4 or 6. Callers bring the low nibble of a byte
for the even column, and e8m0 exponents, which are ``2 ** (byte - 127)``.

The kernel multiplies e5m2 numbers, so it takes each exponent e relative to a scale ``2 ** s`` that 128 x 128 weights
share: a byte that is ``e - s + 16``, modulo 256. It makes a table of the eight magnitudes of it, whose entries are
right where e5m2 has them as normal numbers, and only those are looked up (`binades` finds such an s). The entry of zero
is right for any byte, so groups of zeros keep their exponent too: the way back loses nothing.

Rows go by `tiles`, codes and exponents alike. Codes of 128 columns of a tile of R rows lie one after the other as

    [m64 R/64][half of the columns 2][warp 4][place 32][word 4][byte 4]

Lane l of warp w has, at place ``l ^ l / 8``, in word j eight codes of row ``64 m + 16 w + l / 4 + 8 (j % 2)``: at
columns ``64 half + 32 (j / 2) + 4 (l % 4)`` and the next three, then the same 16 columns on. That is what it holds of
two 64 x 32 operands of the tensor cores; the place puts what is read at once into different banks. Nibble i of a word
has the magnitude of code i in its low bits. Signs of codes 0 to 3 are the top bits of the odd nibbles, where expanded
codes need them, those of 4 to 7 the top bits of the even nibbles, four below that. Exponents of the same 128 columns
lie as

    [m64 R/64][warp 4][l / 4: 8][row, row + 8: 2][group 4]
"""

from __future__ import annotations

import torch

from megamoe_jit._layer.tiles import TileOrder
from megamoe_jit._spec import BLOCK, MXFP4

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  #: of codes 0 to 7; eight more is the negative
OFFSET = 16  #: of the kernel's exponent of a group that has its block's
BLOCK_GROUPS = BLOCK // MXFP4.group  #: exponents of it
_ROWS = (4, 2, 8)  #: of 64: warp, row and row + 8, lane / 4
#: tile, k-block, m64, half of the columns, warp, lane / 4, lane % 4, k32 of the half, row and row + 8, 16 columns, byte
_CODES = TileOrder(_ROWS, (2, 2, 2, 4, 2), (0, 5, 1, 6, 2, 4, 9, 7, 3, 8, 10))
#: tile, k-block, m64, warp, lane / 4, row and row + 8, group
_EXPONENTS = TileOrder(_ROWS, (BLOCK_GROUPS,), (0, 5, 1, 2, 4, 3, 6))
#: Bits of a word with the signs of codes 0 to 7: above their magnitudes, and where the expansion wants them.
_SIGNS, _EXPANDED = (3, 7, 11, 15, 19, 23, 27, 31), (7, 15, 23, 31, 3, 11, 19, 27)


def _swizzle(threads: torch.Tensor) -> torch.Tensor:
    """Sixteen bytes of each thread in the order of memory, or back: its own inverse; always a new tensor."""
    lane = torch.arange(32, dtype=torch.int64, device=threads.device)
    return threads.reshape(-1, 32, 16)[:, lane ^ lane // 8].view(threads.shape)


def _move_signs(words: torch.Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """Signs of int32 words from some bits to others, in place."""
    signs = words & -0x77777778
    words &= 0x77777777
    for old, new in zip(before, after, strict=True):
        words |= ((signs >> old) & 1) << new


def pack(codes: torch.Tensor, gated: bool) -> torch.Tensor:
    """See `WeightFormat.pack`."""
    packed = _swizzle(_CODES.pack(codes, gated))
    _move_signs(packed.view(torch.int32), _SIGNS, _EXPANDED)
    return packed


def unpack(codes: torch.Tensor, gated: bool) -> torch.Tensor:
    """See `WeightFormat.unpack`."""
    plain = _swizzle(codes)
    _move_signs(plain.view(torch.int32), _EXPANDED, _SIGNS)
    return _CODES.unpack(plain, gated)


def pack_exponents(exponents: torch.Tensor, gated: bool) -> torch.Tensor:
    """See `WeightFormat.pack_exponents`."""
    return _EXPONENTS.pack(exponents, gated)


def unpack_exponents(exponents: torch.Tensor, gated: bool) -> torch.Tensor:
    """See `WeightFormat.unpack_exponents`."""
    return _EXPONENTS.unpack(exponents, gated)


def relative_exponents(e8m0: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Exponents of a matrix uint8 ``[rows, groups]`` relative to float32 scales that are powers of two."""
    return e8m0 + OFFSET - _biased(scales)


def absolute_exponents(exponents: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Inverse of `relative_exponents`."""
    return exponents - OFFSET + _biased(scales)


def _biased(scales: torch.Tensor) -> torch.Tensor:
    """The exponents of floats as their bits have them, modulo 256, for each group; biased like e8m0."""
    bits = (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return to_groups(bits)


def to_groups(blocks: torch.Tensor) -> torch.Tensor:
    """A number of each block ``[rows / 128, depth / 128]``, for each group: ``[rows, groups]``."""
    return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK_GROUPS, 1)


def byte_values(device: torch.device) -> torch.Tensor:
    """The two values of each byte of codes, that of the low nibble first; float32 ``[256, 2]``."""
    values = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float32, device=device)
    return torch.cartesian_prod(values, values).flip(-1)


def dequantize(codes: torch.Tensor, e8m0: torch.Tensor) -> torch.Tensor:
    """See `WeightFormat.dequantize`: codes ``[..., rows, depth / 2]`` and exponents ``[..., rows, depth / 32]``."""
    codes, powers = codes.view(torch.uint8), e8m0.view(torch.float8_e8m0fnu).float()
    groups = byte_values(codes.device)[codes.int()].reshape(*e8m0.shape, MXFP4.group)
    return (groups * powers.unsqueeze(-1)).reshape(*codes.shape[:-1], codes.shape[-1] * 2)
