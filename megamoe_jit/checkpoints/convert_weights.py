"""Weights of one kind as weights of another, one part of an expert at a time.

Nothing is rounded unless it has to be. FP8 with block scales stays as it is, and scales become float32; a scale for a
whole matrix is one for each of its blocks. Values are quantised as `quantize_weights` does. A scale for each row cannot
be kept by blocks: that is refused unless the caller asks for the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.quantize import dequantize_weights, quantize_weights
from megamoe_jit._spec.formats import FP8
from megamoe_jit._text import shown
from megamoe_jit.checkpoints.stored import Kind, StoredMatrix

__all__ = ["TARGETS", "Target", "fp8_of", "scales_of", "target_of", "values_of"]


class Target(ABC):
    """What stored weights are made into."""

    @abstractmethod
    def parts(self, rows: int, depth: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """Dtypes and shapes of the tensors that a matrix is made into; the first one has the codes or the values."""

    @abstractmethod
    def convert(self, stored: StoredMatrix, device: torch.device) -> list[torch.Tensor]:
        """These tensors of some rows, on a device."""


class _Fp8(Target):
    def parts(self, rows: int, depth: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        return [(FP8.code_dtype, FP8.code_shape(rows, depth)), (FP8.scale_dtype, FP8.scale_shape(rows, depth))]

    def convert(self, stored: StoredMatrix, device: torch.device) -> list[torch.Tensor]:
        return list(fp8_of(stored, device))


class _Values(Target):
    def parts(self, rows: int, depth: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        return [(torch.bfloat16, (rows, depth))]

    def convert(self, stored: StoredMatrix, device: torch.device) -> list[torch.Tensor]:
        return [values_of(stored, device).to(torch.bfloat16)]


TARGETS: dict[str, Target] = {"fp8": _Fp8(), "bf16": _Values()}


def target_of(weight_format: str, kind: Kind, lossy: bool) -> Target:
    """The target of a name, "auto" for what suits the stored kind best.

    Raises:
        ConfigError: it is none, or weights would lose something that nobody asked to lose.
    """
    if not isinstance(weight_format, str) or weight_format not in ("auto", *TARGETS):
        raise ConfigError(f"weight_format = {shown(weight_format)}; allowed: auto, {', '.join(TARGETS)}")
    if kind is Kind.FP8_CHANNEL and weight_format != "bf16" and not lossy:
        raise ConfigError(
            "experts have a scale for each row, which blocks of 128 x 128 cannot keep; allowed: lossy=True, which "
            "quantises them once more, or another release of the model"
        )
    chosen = str(kind) if weight_format == "auto" and str(kind) in TARGETS else weight_format
    return TARGETS["fp8" if chosen == "auto" else chosen]


def scales_of(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32; exponents, also as bytes, as the powers of two that they mean."""
    if scales.dtype is torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()


def fp8_of(stored: StoredMatrix, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes ``[rows, columns]`` and float32 scales ``[rows / 128, columns / 128]``, on a device."""
    if stored.kind is Kind.FP8 or stored.kind is Kind.FP8_TENSOR:
        assert stored.scales is not None
        shape = FP8.scale_shape(*stored.codes.shape)
        scales = scales_of(stored.scales).to(device)
        return stored.codes.to(device), scales.reshape(1, 1).expand(shape) if scales.numel() == 1 else scales
    return quantize_weights(values_of(stored, device))


def values_of(stored: StoredMatrix, device: torch.device) -> torch.Tensor:
    """The values, float32 ``[rows, columns]`` unless they are stored as values, on a device."""
    codes = stored.codes.to(device)
    if stored.scales is None:
        return codes
    if stored.kind is Kind.FP8_CHANNEL:
        return codes.float() * scales_of(stored.scales).to(device).reshape(-1, 1)
    return dequantize_weights(*(each.contiguous() for each in fp8_of(stored, device)))
