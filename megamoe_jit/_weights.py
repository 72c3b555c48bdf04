"""The gate/up interleave that the kernel reads, and its inverse.

The first GEMM produces gate and up columns of one intermediate channel in the same tile, and in the same
thread, when the rows of ``w13`` come in groups of eight: ``g0..7, u0..7, g8..15, u8..15, ...``.  Scales are
looked up by the original block (gate blocks first, then up blocks) and stay as they are; ``w2`` stays as it
is.

Rows move within one expert only, so a transformed tensor can be permuted by expert like the original, and
both directions run in place with one expert of scratch.  Nothing marks a tensor as transformed: keep count.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch

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

WeightPair: TypeAlias = tuple[torch.Tensor, torch.Tensor]  #: codes and scales


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


@torch.no_grad()
def _apply(
    permute: Callable[[torch.Tensor], torch.Tensor],
    l1: WeightPair,
    l2: WeightPair,
    inplace: bool,
    experts: Iterable[int] | None,
) -> tuple[WeightPair, WeightPair]:
    _check(l1, l2)
    w13, scales = l1
    if w13.ndim == 2 and experts is not None:
        raise ConfigError("experts was given with one [2I, H] matrix; allowed: only with [experts, 2I, H]")
    source = w13.view(torch.uint8).unsqueeze(0) if w13.ndim == 2 else w13.view(torch.uint8)
    count = source.shape[0]
    try:
        chosen = list(range(count)) if experts is None else [operator.index(e) for e in experts]
    except TypeError:
        given = f"{experts!r:.80}"
        raise ConfigError(f"experts = {given}; allowed: distinct local experts from 0 to {count - 1}") from None
    if len(set(chosen)) != len(chosen) or any(not 0 <= e < count for e in chosen):
        raise ConfigError(f"experts = {chosen}; allowed: distinct local experts from 0 to {count - 1}")
    if inplace:
        target = source
    elif experts is None:
        target = torch.empty_like(source, memory_format=torch.contiguous_format)
    else:
        target = source.clone(memory_format=torch.contiguous_format)
    for e in chosen:
        target[e].copy_(permute(source[e]))
    result = w13 if inplace else target.view(w13.shape).view(torch.float8_e4m3fn)
    return (result, scales), l2


def transform_weights_for_mega_moe_sm90(
    l1: WeightPair, l2: WeightPair, *, inplace: bool = False, experts: Iterable[int] | None = None
) -> tuple[WeightPair, WeightPair]:
    """Bring quantised weights into the order the kernel reads.

    Args:
        l1: ``w13`` float8_e4m3fn ``[E_local, 2I, H]``, gate rows first, then up rows, and its scales float32
            ``[E_local, 2I / 128, H / 128]``; or one expert, without the first dimension.
        l2: ``w2`` float8_e4m3fn ``[E_local, H, I]`` and its scales float32 ``[E_local, H / 128, I / 128]``.
        inplace: Permute ``w13`` where it is and return it, with one expert of scratch.
        experts: Only these local experts; the others keep their order.

    Returns:
        `l1` with the rows of ``w13`` interleaved, and `l2`.  Scales and ``w2`` are the tensors that were
        given.

    Raises:
        ConfigError: A dtype, shape or expert number is not supported.
    """
    return _apply(_interleave, l1, l2, inplace, experts)


def inverse_transform_weights_for_mega_moe_sm90(
    l1: WeightPair, l2: WeightPair, *, inplace: bool = False, experts: Iterable[int] | None = None
) -> tuple[WeightPair, WeightPair]:
    """Undo `transform_weights_for_mega_moe_sm90`; same arguments, dtypes and shapes.

    Returns:
        `l1` with gate rows first, then up rows, and `l2`.
    """
    return _apply(_deinterleave, l1, l2, inplace, experts)
