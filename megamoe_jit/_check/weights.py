"""Weights of scenarios: drawn from shape and seed alone, in any format."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.from_mxfp4 import fp8_from_mxfp4
from megamoe_jit._layer.given_weights import FORMAT_BY_TYPE, WeightTensors
from megamoe_jit._layer.quantize import quantize_weights
from megamoe_jit._spec import FP8, MXFP4, MoEShape, WeightFormat

EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  #: between the magnitudes of e2m1
SHRUNK = 9  #: a group may be so many binades smaller than it was drawn, less one


def _mxfp4(values: torch.Tensor, gen: torch.Generator) -> WeightTensors:
    """Codes and e8m0 exponents of a matrix float32 ``[rows, depth]``.

    Groups are made smaller by chance, so that those of a block differ as much as FP8 can have exactly.
    """
    groups = values.reshape(values.shape[0], -1, MXFP4.group)
    largest = groups.abs().amax(-1).clamp(min=2.0**-40)
    exponents = torch.floor(torch.log2(largest)).to(torch.int32) - 2  # the largest becomes 4 to 8
    scaled = groups / torch.pow(2.0, exponents.float()).unsqueeze(-1)
    edges = torch.tensor(EDGES, dtype=torch.float32, device=values.device)
    codes = torch.bucketize(scaled.abs(), edges).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    codes = codes.view(values.shape)
    shrunk = torch.randint(0, SHRUNK, exponents.shape, generator=gen, dtype=torch.int32, device=values.device)
    rare = torch.rand(exponents.shape, generator=gen, dtype=torch.float32, device=values.device) < 0.1
    e8m0 = (exponents + 127 - torch.where(rare, shrunk, 0)).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, e8m0


def _packed(values: torch.Tensor, gen: torch.Generator, weights: WeightFormat) -> WeightTensors:
    """One expert's matrix in a format, as callers bring it.

    Args:
        values: float32 ``[rows, depth]``.
        gen: of chance, where the values are.
        weights: `MXFP4`, or a format of FP8 codes, which then have the values of those.
    """
    packed = _mxfp4(values, gen)
    return packed if weights is MXFP4 else fp8_from_mxfp4(*packed, dtype=weights.code_dtype)


@dataclass(frozen=True, slots=True)
class Weights:
    """Quantised weights of all experts, shared ones last, gate rows first: as a checkpoint has them."""

    l1: WeightTensors  #: e4m3 [E, 2I, H], float32 [E, 2I / 128, H / 128]; or codes and e8m0 exponents of MXFP4
    l2: WeightTensors  #: e4m3 [E, H, I], float32 [E, H / 128, I / 128]; likewise


def generator(device: torch.device | str, *key: object) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(zlib.crc32(repr(key).encode()))


def made(gen: torch.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """How tensors of numbers and of indices are made: where the generator is, whatever the program's defaults are."""
    return {"dtype": torch.float32, "device": gen.device}, {"dtype": torch.int64, "device": gen.device}


def make_weights(shape: MoEShape, device: torch.device | str, seed: int = 0, weights: WeightFormat = FP8) -> Weights:
    """Weights 0.05 * normal, quantised; the same for the same shape, device kind and seed, but for the format.

    Raises:
        ConfigError: calls do not know weights of this format, or take them for another's.
    """
    if FORMAT_BY_TYPE.get(weights.code_dtype) is not weights:
        allowed = ", ".join(each.name for each in dict.fromkeys(FORMAT_BY_TYPE.values()))
        raise ConfigError(f"weights in {weights.name} cannot be drawn: no call takes them yet; allowed: {allowed}")
    experts = shape.experts_of(1)
    gen = generator(device, "weights", shape.hidden, shape.intermediate, experts, seed)

    def matrices(n: int, k: int) -> WeightTensors:
        stacks: list[torch.Tensor] = []
        for e in range(experts):
            drawn = torch.randn(n, k, generator=gen, dtype=torch.float32, device=device) * 0.05
            made = quantize_weights(drawn) if weights is FP8 else _packed(drawn, gen, weights)
            stacks = stacks or [torch.empty((experts, *part.shape), dtype=part.dtype, device=device) for part in made]
            for stack, part in zip(stacks, made, strict=True):
                stack[e] = part
        return tuple(stacks)

    l1 = matrices(2 * shape.intermediate, shape.hidden)
    return Weights(l1, matrices(shape.hidden, shape.intermediate))
