"""The order in which the kernel reads weights, and its inverse; which order that is, their format knows (`_fp8`).

Codes change places within one expert's matrix, and scales stay as they are.  Nothing moves from one expert to another,
so a transformed tensor can be permuted by expert like the original, and both directions run in place with a few
matrices of one expert as scratch. Nothing marks a tensor as transformed: keep count.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._formats import FP8, WeightFormat
from megamoe_jit._layer.quantize import require_tensor
from megamoe_jit._spec import BLOCK

__all__ = [
    "WeightPair",
    "inverse_transform_weights_for_mega_moe_sm90",
    "require_pair",
    "transform_weights_for_mega_moe_sm90",
]

WeightPair: TypeAlias = tuple[torch.Tensor, torch.Tensor]  #: codes and scales
_Order: TypeAlias = Callable[[torch.Tensor], torch.Tensor]  #: one expert's matrix to a new one


def require_pair(name: str, pair: object) -> None:
    """Raise `ConfigError` unless `pair` is two tensors."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        given = f"{type(pair).__name__} of {len(pair)}" if isinstance(pair, tuple | list) else type(pair).__name__
        raise ConfigError(f"{name}: {given} given; allowed: a pair of tensors, codes and scales")
    require_tensor(f"{name} weights", pair[0])
    require_tensor(f"{name} scales", pair[1])


def _check_pair(name: str, pair: WeightPair, weights: WeightFormat) -> None:
    require_pair(name, pair)
    codes, scales = pair
    if codes.dtype is not weights.code_dtype:
        raise ConfigError(f"{name} weights are {codes.dtype}; allowed: {weights.code_dtype}")
    if scales.dtype is not weights.scale_dtype:
        raise ConfigError(f"{name} scales are {scales.dtype}; allowed: {weights.scale_dtype}")
    if codes.ndim not in (2, 3):
        raise ConfigError(f"{name} weights have shape {tuple(codes.shape)}; allowed: [experts, N, K] or one [N, K]")
    *lead, n, stored = codes.shape
    k = stored * 8 // weights.bits
    if n == 0 or n % BLOCK or k == 0 or k % BLOCK:
        raise ConfigError(f"{name} weights have shape {tuple(codes.shape)}; allowed: N and K multiples of 128")
    expected = (*lead, *weights.scale_shape(n, k))
    if tuple(scales.shape) != expected:
        block = " x ".join(map(str, weights.scale_block))
        raise ConfigError(f"{name} scales have shape {tuple(scales.shape)}; allowed: {expected}, one per {block}")


def _check(l1: WeightPair, l2: WeightPair, weights: WeightFormat) -> None:
    _check_pair("l1", l1, weights)
    _check_pair("l2", l2, weights)
    *lead, rows, stored = l1[0].shape
    hidden = stored * 8 // weights.bits
    if rows % (2 * BLOCK):
        raise ConfigError(f"l1 weights have {rows} rows; allowed: 2 x intermediate, a multiple of 256")
    expected = (*lead, *weights.code_shape(hidden, rows // 2))
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
    return codes if inplace else target.view(codes.shape).view(codes.dtype)


@torch.no_grad()
def _apply(
    weights: WeightFormat,
    order: Callable[[torch.Tensor, bool], torch.Tensor],
    l1: WeightPair,
    l2: WeightPair,
    inplace: bool,
    experts: Iterable[int] | None,
) -> tuple[WeightPair, WeightPair]:
    _check(l1, l2, weights)
    chosen = _chosen(experts, l1[0])
    if inplace:
        for name, (codes, _) in (("l1", l1), ("l2", l2)):
            if any(size > 1 and stride == 0 for size, stride in zip(codes.shape, codes.stride(), strict=True)):
                raise ConfigError(
                    f"{name} weights have strides {codes.stride()}, so several of their elements are one; "
                    "allowed with inplace=True: each element in a place of its own"
                )
    w13 = _apply_to(l1[0], lambda codes: order(codes, True), inplace, chosen)
    w2 = _apply_to(l2[0], lambda codes: order(codes, False), inplace, chosen)
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
    return _apply(FP8, FP8.pack, l1, l2, inplace, experts)


def inverse_transform_weights_for_mega_moe_sm90(
    l1: WeightPair, l2: WeightPair, *, inplace: bool = False, experts: Iterable[int] | None = None
) -> tuple[WeightPair, WeightPair]:
    """Undo `transform_weights_for_mega_moe_sm90`; same arguments, dtypes and shapes.

    Returns:
        `l1` with gate rows first, then up rows, and `l2`, both with rows of consecutive bytes.
    """
    return _apply(FP8, FP8.unpack, l1, l2, inplace, experts)
