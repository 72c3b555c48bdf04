"""Weights of a layer between the plain order, of callers and files, and the kernel's, one expert at a time.

What is written keeps its address, so that captured graphs read the new values, and nothing is held twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.marks import require_plain
from megamoe_jit._layer.quantize import quantize_weights
from megamoe_jit._layer.weights import WeightPair, require_pair
from megamoe_jit._spec.formats import FP8

__all__ = ["FLOATS", "L1", "L2", "Matrix", "check_matrix", "check_same", "read_matrix", "write_matrix"]

FLOATS, FLOATING = (torch.bfloat16, torch.float16, torch.float32), "bfloat16, float16 or float32"


class Matrix(NamedTuple):
    """One of the two matrices of each expert: its name among callers, and whether it holds gate and up rows."""

    name: str
    gated: bool


L1, L2 = Matrix("w13", True), Matrix("w2", False)


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
