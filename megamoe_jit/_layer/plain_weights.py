"""Weights of a layer between the plain order, of callers and files, and the kernel's, one expert at a time.

What is written keeps its address, so that captured graphs read the new values, and nothing is held twice.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.binades import NORMAL, refuse_inexact
from megamoe_jit._layer.checks import check_tensor
from megamoe_jit._layer.from_mxfp4 import block_bounds
from megamoe_jit._layer.given_weights import (
    WeightTensors,
    as_bytes,
    check_exponents,
    check_pairs,
    format_of,
    readable_scales,
    refuse_nan,
    require_tensors,
    require_values,
)
from megamoe_jit._layer.marks import require_marked, require_plain, spans
from megamoe_jit._layer.mxfp4 import absolute_exponents
from megamoe_jit._layer.quantize import quantize_weights
from megamoe_jit._layer.reorder import order_groups
from megamoe_jit._layer.weights import mark_transformed
from megamoe_jit._spec import FP8, MXFP4, MoEShape, WeightFormat, check_int
from megamoe_jit._spec.checks import check

FLOATS, FLOATING = (torch.bfloat16, torch.float16, torch.float32), "bfloat16, float16 or float32"


Given: TypeAlias = torch.Tensor | WeightTensors  #: a matrix as callers bring it: values, or codes and their factors


class Matrix(NamedTuple):
    """One of the two matrices of each expert: its name among callers, and whether it holds gate and up rows."""

    name: str
    gated: bool


L1, L2 = Matrix("w13", True), Matrix("w2", False)


def parts(l1: WeightTensors, l2: WeightTensors, shared: int) -> list[tuple[Matrix, WeightTensors]]:
    """Both matrices of a layer by their names among callers, and those of shared experts, which are the last ones."""
    whole = [(L1, l1), (L2, l2)]
    if not shared:
        return whole
    routed = [(matrix, tuple(each[:-shared] for each in held)) for matrix, held in whole]
    return routed + [
        (matrix._replace(name=f"shared_{matrix.name}"), tuple(each[-shared:] for each in held))
        for matrix, held in whole
    ]


def check_layer(
    w13: Given, w2: Given, topk: int, num_shared: int | None, shared: tuple[Given | None, Given | None]
) -> MoEShape:
    """The shape of the layer of these weights; raises unless they fit each other.

    Args:
        w13, w2: of the routed experts, and of the shared ones behind them if they do not come apart.
        topk: slots of a token that the router fills.
        num_shared: shared experts; None for those that come apart, or none.
        shared: both matrices of shared experts, or twice None.
    """
    gate_up, down = check_matrix("w13", w13, 3), check_matrix("w2", w2, 3)
    stored = check_format("w2", w2, format_given("w13", w13))
    experts, rows, width = gate_up.shape
    hidden = stored.depth_of(width)
    if rows % 2:
        raise ConfigError(f"w13 has {rows} rows; allowed: gate rows and as many up rows")
    second = (experts, *stored.code_shape(hidden, rows // 2))
    _check_shape("w2", down, second, f"to fit w13 {tuple(gate_up.shape)}")
    if num_shared is not None:
        check_int("num_shared_experts", num_shared)
    if shared[0] is None and shared[1] is None:
        count = num_shared or 0
        allowed = f"0 to {experts - 1}, the last of the {experts} experts of w13; or shared_w13 and shared_w2"
        check(0 <= count < max(experts, 1), "num_shared_experts", count, allowed)
        return MoEShape(hidden, rows // 2, experts - count, topk, count)
    if shared[0] is None or shared[1] is None:
        raise ConfigError("one of shared_w13 and shared_w2 is missing; allowed: both or none")
    up, out = check_matrix("shared_w13", shared[0]), check_matrix("shared_w2", shared[1])
    for name, given in (("shared_w13", shared[0]), ("shared_w2", shared[1])):
        check_format(name, given, stored)
    count = up.shape[0] if num_shared is None else num_shared
    why = "of the routed ones' sizes; one that is n times as wide is n of these"
    _check_shape("shared_w13", up, (count, rows, width), why)
    _check_shape("shared_w2", out, (count, *second[1:]), why)
    for name, tensor in (("shared_w13", up), ("shared_w2", out)):
        if tensor.device != gate_up.device:
            raise ConfigError(f"{name} is on {tensor.device}; allowed: {gate_up.device}, where w13 is")
    return MoEShape(hidden, rows // 2, experts, topk, count)


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], why: str) -> None:
    if tensor.shape != shape:
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; allowed: {shape}, {why}")


def format_given(name: str, weights: Given) -> WeightFormat:
    """The format that a layer holds these in: values are quantised to FP8."""
    return FP8 if isinstance(weights, torch.Tensor) else format_of(name, weights)


def check_format(name: str, weights: Given, wanted: WeightFormat) -> WeightFormat:
    """The format of a layer; raises `ConfigError` unless these weights are of it as well."""
    found = format_given(name, weights)
    if found is not wanted:
        what, dtype = ("values", weights.dtype) if isinstance(weights, torch.Tensor) else ("codes", weights[0].dtype)
        given, shared = f"{name} {what} are {dtype}, which a layer holds in {found.name}", name.startswith("shared")
        packed = found is MXFP4 or (shared and wanted is MXFP4)
        way = "; fp8_from_mxfp4 makes FP8 weights of MXFP4 ones" if packed else ""
        way += "; or shared experts run beside the layer, by themselves" if shared else ""
        raise ConfigError(f"{given}; allowed: what it holds in {wanted.name}{way}")
    return found


def check_matrix(name: str, weights: Given, most: int = 2) -> torch.Tensor:
    """The values, or the codes of a pair; raises unless there is one matrix for each expert."""
    if not isinstance(weights, torch.Tensor):
        weights = require_tensors(name, weights, most)[0]
    elif weights.dtype not in FLOATS:
        raise ConfigError(f"{name} has dtype {weights.dtype}; allowed: {FLOATING}, or a pair of codes and scales")
    if weights.ndim != 3:
        raise ConfigError(f"{name} has {weights.ndim} dimensions; allowed: 3")
    require_values(name, weights)
    return weights


def own_pair(name: str, weights: Given, shared: Given | None, device: torch.device, inplace: bool) -> WeightTensors:
    """Codes that may be written over, and scales, those of shared experts behind the others."""
    pair = _read(name, weights, device, inplace)
    if shared is not None:
        more = _read(f"shared_{name}", shared, device, inplace)
        return tuple(_joined(*each) for each in zip(pair, more, strict=True))
    if inplace or isinstance(weights, torch.Tensor):
        return pair
    return tuple(each.clone(memory_format=torch.contiguous_format) for each in pair)


def in_order(w13: Given, w2: Given, shared: object, inplace: bool) -> tuple[WeightTensors, WeightTensors] | None:
    """Both matrices if they are marked as being in the kernel's order: themselves, or copies; None if plain."""
    if isinstance(w13, torch.Tensor) or isinstance(w2, torch.Tensor):
        return None
    weights = format_of("w13", w13)
    try:
        for name, given in (("l1", w13), ("l2", w2)):
            require_marked(name, given[0], spans(given[0]), weights=weights)
    except ConfigError:
        return None
    check_pairs(w13, w2, ordered=True)
    if shared is not None:
        raise ConfigError("w13 and w2 are in the kernel's order already; allowed with shared_w13: plain weights")
    if not inplace:
        w13, w2 = (tuple(each.clone(memory_format=torch.contiguous_format) for each in given) for given in (w13, w2))
        mark_transformed(w13, w2)
    return (*w13[:-1], readable_scales(w13[-1])), (*w2[:-1], readable_scales(w2[-1]))


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """One behind the other; torch cannot join all types of codes."""
    if first.itemsize > 1:
        return torch.cat((first, second))
    return torch.cat((as_bytes(first), as_bytes(second))).view(first.dtype)


def _read(name: str, weights: Given, device: torch.device, inplace: bool) -> WeightTensors:
    """Codes and what belongs to them, which may still be the caller's; raises for what a call would refuse."""
    if isinstance(weights, torch.Tensor):
        return quantize_weights(weights)
    codes, factors = require_tensors(name, weights, 2)
    stored = format_of(name, weights)
    if inplace:
        check_tensor(f"{name} codes", codes, codes.dtype, codes.shape, device)
    experts, rows, width = codes.shape
    part = stored.parts(rows, stored.depth_of(width))[1]
    shape, what = (experts, *part.shape), f"{name} {part.name}"
    if stored.group:
        check_exponents(what, factors)
        factors = factors if inplace else readable_scales(factors)
        check_tensor(what, as_bytes(factors), part.dtype, shape, device, align=16 if inplace else 1)
        require_plain(name, as_bytes(factors), what=part.name)
    else:
        factors = readable_scales(factors)
        check_tensor(what, factors, part.dtype, shape, device, align=4)
    require_plain(name, as_bytes(codes))  # a copy has no mark
    return codes, factors


def check_same(name: str, given: Given, held: WeightTensors, rounded: bool) -> None:
    """Raise `ConfigError` unless `given` are plain weights for the place of `held`; they may be on another device.

    `rounded` says that values that the format of the layer does not keep are to be rounded, not refused.
    """
    matrix, stored = check_matrix(name, given), format_of(name, held)
    check_format(name, given, stored)
    if matrix.shape != held[0].shape:
        raise ConfigError(f"{name} has shape {tuple(matrix.shape)}; allowed: {tuple(held[0].shape)}, the layer's")
    if isinstance(given, torch.Tensor):
        return
    factors, there, what = given[1], held[1], stored.part_names[1]
    if stored.group:
        check_exponents(f"{name} {what}", factors)
    if (factors.dtype is not there.dtype and not stored.group) or factors.shape != there.shape:
        found, allowed = (f"{each.dtype} {tuple(each.shape)}" for each in (factors, there))
        raise ConfigError(f"{name} {what} are {found}; allowed: {allowed}")
    require_plain(name, as_bytes(given[0]))
    if stored.group:
        require_plain(name, as_bytes(factors), what=what)
        refuse_nan(name, factors)
        if not rounded:
            matrices = zip(given[0], factors, strict=True)
            refuse_inexact(name, block_bounds(matrices, NORMAL), NORMAL, "", range(len(factors)))


@torch.inference_mode()  # what was made in it, and given to be kept where it is, can be written in it alone
def write_matrix(matrix: Matrix, given: Given, held: WeightTensors, rounded: bool) -> None:
    """Write checked plain weights over a layer's; values are quantised on the layer's device, expert by expert."""
    stored, device = format_of(matrix.name, held), held[0].device
    for e, places in enumerate(zip(*held, strict=True)):
        if isinstance(given, torch.Tensor):
            new, factors = quantize_weights(given[e].to(device))
        else:
            new, factors = given[0][e].to(device), given[1][e].to(device)
        if stored.group:
            found = block_bounds([(new, factors)], NORMAL)
            codes_and_exponents = as_bytes(new), as_bytes(factors)
            made = order_groups(*codes_and_exponents, found.of(0), stored, gated=matrix.gated, rounded=rounded)
        else:
            made = stored.pack(as_bytes(new), matrix.gated), factors
        for place, part in zip(places, made, strict=True):
            (as_bytes(place) if part.itemsize == 1 else place).copy_(part)


@torch.no_grad()
def read_matrix(matrix: Matrix, held: WeightTensors) -> WeightTensors:
    """A layer's weights in the plain order, in the CPU's memory: a GPU full of weights has no place for a copy."""
    stored = format_of(matrix.name, held)
    codes = torch.empty(held[0].shape, dtype=held[0].dtype, device="cpu")
    for target, source in zip(as_bytes(codes), as_bytes(held[0]), strict=True):
        target.copy_(stored.unpack(source, matrix.gated))
    if not stored.group:
        return codes, held[1].detach().to("cpu", copy=True)
    e8m0 = torch.empty(held[1].shape, dtype=torch.uint8, device="cpu")
    for target, exponents, scales in zip(e8m0, *held[1:], strict=True):
        target.copy_(absolute_exponents(stored.unpack_exponents(exponents, matrix.gated), scales))
    return codes, e8m0.view(torch.float8_e8m0fnu)
