"""The order in which the kernel reads weights, and its inverse.

Two things are done to the codes of one expert; scales stay as they are.

*Gate and up rows alternate by eights* in ``w13``: ``g0..7, u0..7, g8..15, u8..15, ...``. So the first GEMM has gate and
up of one intermediate channel in the same tile, and in the same thread.

*Tiles are stored as shared memory holds them*, in both matrices: 256 rows (the last tile may have 128) by 128 columns,
one after the other along the columns, then the next 256 rows. A block streams its weights from consecutive addresses,
by plain bulk copies. Inside such a tile the sixteen bytes of row r and columns 16c to 16c + 15 lie at

    128 r + 16 (c ^ r % 8)

which is the 128-byte swizzle that the tensor cores read without bank conflicts.

Nothing moves from one expert to another, so a transformed tensor can be permuted by expert like the original, and both
directions run in place with a few matrices of one expert as scratch. Nothing marks a tensor as transformed: keep count.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch

from megamoe_jit._abi import BLOCK_N
from megamoe_jit._errors import ConfigError
from megamoe_jit._quant import require_tensor
from megamoe_jit._spec import BLOCK

__all__ = [
    "INTERLEAVE",
    "WeightPair",
    "inverse_transform_weights_for_mega_moe_sm90",
    "require_pair",
    "transform_weights_for_mega_moe_sm90",
]

INTERLEAVE = 8  #: rows of gate, then rows of up, in one group
TILE_ROWS = BLOCK_N  #: of a tile; the last may have half
ATOM_ROWS, ATOM_CHUNKS, CHUNK_BYTES = 8, 8, 16  #: of the swizzle

WeightPair: TypeAlias = tuple[torch.Tensor, torch.Tensor]  #: codes and scales
_Order: TypeAlias = Callable[[torch.Tensor], torch.Tensor]  #: one expert's matrix to a new one


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
    row = torch.arange(ATOM_ROWS, device=tiles.device).unsqueeze(1)
    return tiles[..., row, row ^ torch.arange(ATOM_CHUNKS, device=tiles.device), :]


def _pack(w: torch.Tensor, height: int) -> torch.Tensor:
    """Tiles of `height` rows as shared memory holds them."""
    rows, depth = w.shape
    atoms = w.reshape(-1, height // ATOM_ROWS, ATOM_ROWS, depth // BLOCK, ATOM_CHUNKS, CHUNK_BYTES)
    return _swizzle(atoms.permute(0, 3, 1, 2, 4, 5)).reshape(rows, depth)


def _unpack(w: torch.Tensor, height: int) -> torch.Tensor:
    """Inverse of `_pack`."""
    rows, depth = w.shape
    atoms = w.reshape(-1, depth // BLOCK, height // ATOM_ROWS, ATOM_ROWS, ATOM_CHUNKS, CHUNK_BYTES)
    return _swizzle(atoms).permute(0, 2, 3, 1, 4, 5).reshape(rows, depth)


def _order1(w13: torch.Tensor) -> torch.Tensor:
    return _by_tile(_pack, _interleave(w13))


def _order2(w2: torch.Tensor) -> torch.Tensor:
    return _by_tile(_pack, w2)


def _restore1(w13: torch.Tensor) -> torch.Tensor:
    return _deinterleave(_by_tile(_unpack, w13))


def _restore2(w2: torch.Tensor) -> torch.Tensor:
    return _by_tile(_unpack, w2)


def require_pair(name: str, pair: object) -> None:
    """Raise `ConfigError` unless `pair` is two tensors."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        given = f"{type(pair).__name__} of {len(pair)}" if isinstance(pair, tuple | list) else type(pair).__name__
        raise ConfigError(f"{name}: {given} given; allowed: a pair of tensors, codes and scales")
    require_tensor(f"{name} weights", pair[0])
    require_tensor(f"{name} scales", pair[1])


def _check_pair(name: str, pair: WeightPair) -> None:
    require_pair(name, pair)
    codes, scales = pair
    if codes.dtype is not torch.float8_e4m3fn:
        raise ConfigError(f"{name} weights are {codes.dtype}; allowed: torch.float8_e4m3fn")
    if scales.dtype is not torch.float32:
        raise ConfigError(f"{name} scales are {scales.dtype}; allowed: torch.float32")
    if codes.ndim not in (2, 3):
        raise ConfigError(f"{name} weights have shape {tuple(codes.shape)}; allowed: [experts, N, K] or one [N, K]")
    *lead, n, k = codes.shape
    if n == 0 or n % BLOCK or k == 0 or k % BLOCK:
        raise ConfigError(f"{name} weights have shape {tuple(codes.shape)}; allowed: N and K multiples of 128")
    expected = (*lead, n // BLOCK, k // BLOCK)
    if tuple(scales.shape) != expected:
        raise ConfigError(f"{name} scales have shape {tuple(scales.shape)}; allowed: {expected}, one per 128 x 128")


def _check(l1: WeightPair, l2: WeightPair) -> None:
    _check_pair("l1", l1)
    _check_pair("l2", l2)
    *lead, rows, hidden = l1[0].shape
    if rows % (2 * BLOCK):
        raise ConfigError(f"l1 weights have {rows} rows; allowed: 2 x intermediate, a multiple of 256")
    expected = (*lead, hidden, rows // 2)
    if tuple(l2[0].shape) != expected:
        raise ConfigError(
            f"l2 weights have shape {tuple(l2[0].shape)}; allowed: {expected}, to fit l1 {tuple(l1[0].shape)}"
        )


def _chosen(experts: Iterable[int] | None, codes: torch.Tensor) -> list[int]:
    if codes.ndim == 2:
        if experts is not None:
            raise ConfigError("experts was given with one [2I, H] matrix; allowed: only with [experts, 2I, H]")
        return [0]
    count = codes.shape[0]
    try:
        chosen = list(range(count)) if experts is None else [operator.index(e) for e in experts]
    except TypeError:
        given = f"{experts!r:.80}"
        raise ConfigError(f"experts = {given}; allowed: distinct local experts from 0 to {count - 1}") from None
    if len(set(chosen)) != len(chosen) or any(not 0 <= e < count for e in chosen):
        raise ConfigError(f"experts = {chosen}; allowed: distinct local experts from 0 to {count - 1}")
    return chosen


def _apply_to(codes: torch.Tensor, order: _Order, inplace: bool, chosen: list[int]) -> torch.Tensor:
    source = codes.view(torch.uint8).unsqueeze(0) if codes.ndim == 2 else codes.view(torch.uint8)
    if inplace:
        target = source
    elif len(chosen) == source.shape[0]:
        target = torch.empty_like(source, memory_format=torch.contiguous_format)
    else:
        target = source.clone(memory_format=torch.contiguous_format)
    for e in chosen:
        target[e].copy_(order(source[e]))
    return codes if inplace else target.view(codes.shape).view(torch.float8_e4m3fn)


@torch.no_grad()
def _apply(
    orders: tuple[_Order, _Order], l1: WeightPair, l2: WeightPair, inplace: bool, experts: Iterable[int] | None
) -> tuple[WeightPair, WeightPair]:
    _check(l1, l2)
    chosen = _chosen(experts, l1[0])
    if inplace:
        for name, (codes, _) in (("l1", l1), ("l2", l2)):
            if any(size > 1 and stride == 0 for size, stride in zip(codes.shape, codes.stride(), strict=True)):
                raise ConfigError(
                    f"{name} weights have strides {codes.stride()}, so several of their elements are one; "
                    "allowed with inplace=True: each element in a place of its own"
                )
    w13, w2 = (_apply_to(pair[0], order, inplace, chosen) for pair, order in zip((l1, l2), orders, strict=True))
    return (w13, l1[1]), (w2, l2[1])


def transform_weights_for_mega_moe_sm90(
    l1: WeightPair, l2: WeightPair, *, inplace: bool = False, experts: Iterable[int] | None = None
) -> tuple[WeightPair, WeightPair]:
    """Bring quantised weights into the order the kernel reads.

    Args:
        l1: ``w13`` float8_e4m3fn ``[E_local, 2I, H]``, gate rows first, then up rows, and its scales float32
            ``[E_local, 2I / 128, H / 128]``; or one expert, without the first dimension.
        l2: ``w2`` float8_e4m3fn ``[E_local, H, I]`` and its scales float32 ``[E_local, H / 128, I / 128]``.
        inplace: Permute the codes where they are and return them, with a few matrices of one expert as scratch.
        experts: Only these local experts; the others keep their order.

    Returns:
        `l1` and `l2` with codes of the same shape, in the kernel's order, and the scales that were given.

    Raises:
        ConfigError: A dtype, shape or expert number is not supported.
    """
    return _apply((_order1, _order2), l1, l2, inplace, experts)


def inverse_transform_weights_for_mega_moe_sm90(
    l1: WeightPair, l2: WeightPair, *, inplace: bool = False, experts: Iterable[int] | None = None
) -> tuple[WeightPair, WeightPair]:
    """Undo `transform_weights_for_mega_moe_sm90`; same arguments, dtypes and shapes.

    Returns:
        `l1` with gate rows first, then up rows, and `l2`, both with rows of consecutive bytes.
    """
    return _apply((_restore1, _restore2), l1, l2, inplace, experts)
