"""Weights of a layer between the plain order, of callers and files, and the kernel's, one expert at a time.

What is written keeps its address, so that captured graphs read the new values, and nothing is held twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.checks import check_tensor
from megamoe_jit._layer.marks import require_marked, require_plain, spans
from megamoe_jit._layer.quantize import quantize_weights
from megamoe_jit._layer.weights import (
    WeightPair,
    check_pairs,
    mark_transformed,
    readable_scales,
    require_pair,
)
from megamoe_jit._spec import MoEShape, check_int
from megamoe_jit._spec.formats import FP8
from megamoe_jit._text import shown

__all__ = [
    "FLOATS",
    "L1",
    "L2",
    "Matrix",
    "check_layer",
    "check_matrix",
    "check_same",
    "in_order",
    "own_pair",
    "parts",
    "read_matrix",
    "write_matrix",
]

FLOATS, FLOATING = (torch.bfloat16, torch.float16, torch.float32), "bfloat16, float16 or float32"


class Matrix(NamedTuple):
    """One of the two matrices of each expert: its name among callers, and whether it holds gate and up rows."""

    name: str
    gated: bool


L1, L2 = Matrix("w13", True), Matrix("w2", False)


def parts(l1: WeightPair, l2: WeightPair, shared: int) -> list[tuple[Matrix, WeightPair]]:
    """Both matrices of a layer by their names among callers, and those of shared experts, which are the last ones."""
    whole = [(L1, l1), (L2, l2)]
    if not shared:
        return whole
    routed = [(matrix, (codes[:-shared], scales[:-shared])) for matrix, (codes, scales) in whole]
    return routed + [
        (matrix._replace(name=f"shared_{matrix.name}"), (codes[-shared:], scales[-shared:]))
        for matrix, (codes, scales) in whole
    ]


def check_layer(
    w13: torch.Tensor | WeightPair,
    w2: torch.Tensor | WeightPair,
    topk: int,
    num_shared: int | None,
    shared: tuple[torch.Tensor | WeightPair | None, torch.Tensor | WeightPair | None],
) -> MoEShape:
    """The shape of the layer of these weights; raises unless they fit each other.

    Args:
        w13, w2: of the routed experts, and of the shared ones behind them if they do not come apart.
        topk: slots of a token that the router fills.
        num_shared: shared experts; None for those that come apart, or none.
        shared: both matrices of shared experts, or twice None.
    """
    gate_up, down = check_matrix("w13", w13), check_matrix("w2", w2)
    experts, rows, hidden = gate_up.shape
    if rows % 2:
        raise ConfigError(f"w13 has {rows} rows; allowed: gate rows and as many up rows")
    _check_shape("w2", down, (experts, hidden, rows // 2), f"to fit w13 {tuple(gate_up.shape)}")
    if num_shared is not None:
        check_int("num_shared_experts", num_shared)
    if shared[0] is None and shared[1] is None:
        count = num_shared or 0
        if not 0 <= count < max(experts, 1):
            allowed = f"0 to {experts - 1}, the last of the {experts} experts of w13; or shared_w13 and shared_w2"
            raise ConfigError(f"num_shared_experts = {shown(count)} is not supported; allowed: {allowed}")
        return MoEShape(hidden, rows // 2, experts - count, topk, count)
    if shared[0] is None or shared[1] is None:
        raise ConfigError("one of shared_w13 and shared_w2 is missing; allowed: both or none")
    up, out = check_matrix("shared_w13", shared[0]), check_matrix("shared_w2", shared[1])
    count = up.shape[0] if num_shared is None else num_shared
    why = "of the routed ones' sizes; one that is n times as wide is n of these"
    _check_shape("shared_w13", up, (count, rows, hidden), why)
    _check_shape("shared_w2", out, (count, hidden, rows // 2), why)
    for name, tensor in (("shared_w13", up), ("shared_w2", out)):
        if tensor.device != gate_up.device:
            raise ConfigError(f"{name} is on {tensor.device}; allowed: {gate_up.device}, where w13 is")
    return MoEShape(hidden, rows // 2, experts, topk, count)


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], why: str) -> None:
    if tensor.shape != shape:
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; allowed: {shape}, {why}")


def check_matrix(name: str, weights: torch.Tensor | WeightPair) -> torch.Tensor:
    """The values, or the codes of a pair; raises unless there is one matrix for each expert."""
    if not isinstance(weights, torch.Tensor):
        require_pair(name, weights)
        weights = weights[0]
    elif weights.dtype not in FLOATS:
        raise ConfigError(f"{name} has dtype {weights.dtype}; allowed: {FLOATING}, or a pair of codes and scales")
    if weights.ndim != 3:
        raise ConfigError(f"{name} has {weights.ndim} dimensions; allowed: 3")
    return weights


def own_pair(
    name: str,
    weights: torch.Tensor | WeightPair,
    shared: torch.Tensor | WeightPair | None,
    device: torch.device,
    inplace: bool,
) -> WeightPair:
    """Codes that may be written over, and scales, those of shared experts behind the others."""
    pair = _read(name, weights, device, inplace)
    if shared is not None:
        more = _read(f"shared_{name}", shared, device, inplace)
        codes = torch.cat([each[0].view(torch.uint8) for each in (pair, more)]).view(FP8.code_dtype)
        return codes, torch.cat((pair[1], more[1]))
    if inplace or isinstance(weights, torch.Tensor):
        return pair
    return tuple(each.clone(memory_format=torch.contiguous_format) for each in pair)  # type: ignore[return-value]


def in_order(
    w13: torch.Tensor | WeightPair, w2: torch.Tensor | WeightPair, shared: object, inplace: bool
) -> tuple[WeightPair, WeightPair] | None:
    """Both pairs if they are marked as being in the kernel's order: themselves, or copies; None if they are plain."""
    if isinstance(w13, torch.Tensor) or isinstance(w2, torch.Tensor):
        return None
    try:
        for name, (codes, _) in (("l1", w13), ("l2", w2)):
            require_marked(name, codes, spans(codes))
    except ConfigError:
        return None
    check_pairs(w13, w2)
    if shared is not None:
        raise ConfigError("w13 and w2 are in the kernel's order already; allowed with shared_w13: plain weights")
    if not inplace:
        w13, w2 = ((codes.contiguous().clone(), scales.clone()) for codes, scales in (w13, w2))
        mark_transformed(w13, w2)
    return (w13[0], readable_scales(w13[1])), (w2[0], readable_scales(w2[1]))


def _read(name: str, weights: torch.Tensor | WeightPair, device: torch.device, inplace: bool) -> WeightPair:
    """Codes and scales, which may still be the caller's; raises for what a call would refuse."""
    if isinstance(weights, torch.Tensor):
        return quantize_weights(weights)
    codes, scales = weights
    if inplace:
        check_tensor(f"{name} codes", codes, FP8.code_dtype, codes.shape, device)
    experts, rows, depth = codes.shape
    scales, blocks = readable_scales(scales), (experts, *FP8.scale_shape(rows, depth))
    check_tensor(f"{name} scales", scales, FP8.scale_dtype, blocks, device, align=4)
    require_plain(name, codes)  # a copy has no mark
    return codes, scales


def check_same(name: str, given: torch.Tensor | WeightPair, held: WeightPair) -> None:
    """Raise `ConfigError` unless `given` are plain weights for the place of `held`; they may be on another device."""
    matrix = check_matrix(name, given)
    if matrix.device.type == "meta":
        raise ConfigError(f"{name} is on meta, which holds no values; allowed: a device with memory")
    if matrix.shape != held[0].shape:
        raise ConfigError(f"{name} has shape {tuple(matrix.shape)}; allowed: {tuple(held[0].shape)}, the layer's")
    if isinstance(given, torch.Tensor):
        return
    for what, tensor, there in zip(("codes", "scales"), given, held, strict=True):
        if tensor.dtype is not there.dtype or tensor.shape != there.shape:
            found, allowed = (f"{each.dtype} {tuple(each.shape)}" for each in (tensor, there))
            raise ConfigError(f"{name} {what} are {found}; allowed: {allowed}")
    require_plain(name, given[0])


@torch.no_grad()
def write_matrix(matrix: Matrix, given: torch.Tensor | WeightPair, held: WeightPair) -> None:
    """Write checked plain weights over a layer's; values are quantised on the layer's device, expert by expert."""
    codes, scales = held[0].view(torch.uint8), held[1]
    for e in range(codes.shape[0]):
        if isinstance(given, torch.Tensor):
            new, factors = quantize_weights(given[e].to(codes.device))
        else:
            new, factors = given[0][e].to(codes.device), given[1][e]
        codes[e].copy_(FP8.pack(new.view(torch.uint8), matrix.gated))
        scales[e].copy_(factors)


@torch.no_grad()
def read_matrix(matrix: Matrix, held: WeightPair) -> WeightPair:
    """A layer's weights in the plain order, in the CPU's memory: a GPU full of weights has no place for a copy."""
    codes = torch.empty(held[0].shape, dtype=held[0].dtype, device="cpu")
    for target, source in zip(codes.view(torch.uint8), held[0].view(torch.uint8), strict=True):
        target.copy_(FP8.unpack(source, matrix.gated))
    return codes, held[1].detach().to("cpu", copy=True)
