"""Weights of one kind as weights of another, one part of an expert at a time.

Nothing is rounded unless it has to be. FP8 with block scales stays as it is, and scales become float32; a scale for a
whole matrix is one for each of its blocks. MXFP4 stays, or becomes FP8 of the same values. Values are quantised. What
would lose something that a quantised model has is refused unless the caller asks for the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer import mxfp4
from megamoe_jit._layer.from_mxfp4 import fp8_from_mxfp4
from megamoe_jit._layer.quantize import dequantize_weights, quantize_weights
from megamoe_jit._spec import check_flag
from megamoe_jit._spec.formats import FP8, MXFP4
from megamoe_jit._text import shown
from megamoe_jit.checkpoints.stored import Kind, StoredMatrix

__all__ = ["TARGETS", "Target", "fp8_of", "mxfp4_of", "scales_of", "target_of", "values_of"]

_TOP = 2  #: exponent of the largest value of e2m1, 6
_BIAS, _MOST = 127, 254  #: of e8m0; 255 is NaN


class Target(ABC):
    """What stored weights are made into.

    Args:
        lossy: roundings that a quantised model would not need are allowed.
    """

    def __init__(self, lossy: bool = False) -> None:
        self.lossy = lossy

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
        return list(fp8_of(stored, device, self.lossy))


class _Mxfp4(Target):
    def parts(self, rows: int, depth: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        exponents = MXFP4.exponent_shape(rows, depth)
        return [(MXFP4.code_dtype, MXFP4.code_shape(rows, depth)), (torch.float8_e8m0fnu, exponents)]

    def convert(self, stored: StoredMatrix, device: torch.device) -> list[torch.Tensor]:
        return list(mxfp4_of(stored, device))


class _Values(Target):
    def parts(self, rows: int, depth: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        return [(torch.bfloat16, (rows, depth))]

    def convert(self, stored: StoredMatrix, device: torch.device) -> list[torch.Tensor]:
        return [values_of(stored, device).to(torch.bfloat16)]


TARGETS: dict[str, type[Target]] = {"fp8": _Fp8, "mxfp4": _Mxfp4, "bf16": _Values}


def target_of(weight_format: str, kind: Kind, lossy: bool) -> Target:
    """The target of a name, "auto" for what suits the stored kind best.

    Raises:
        ConfigError: it is none, or weights would lose something that nobody asked to lose.
    """
    if not isinstance(weight_format, str) or weight_format not in ("auto", *TARGETS):
        raise ConfigError(f"weight_format = {shown(weight_format)}; allowed: auto, {', '.join(TARGETS)}")
    check_flag("lossy", lossy)
    chosen = weight_format if weight_format != "auto" else "mxfp4" if kind is Kind.MXFP4 else "fp8"
    if kind is Kind.FP8_CHANNEL and chosen != "bf16" and not lossy:
        raise ConfigError(
            "experts have a scale for each row, which blocks of 128 x 128 cannot keep; allowed: lossy=True (--lossy), "
            "which quantises them once more, or another release of the model"
        )
    if chosen == "mxfp4" and kind not in (Kind.MXFP4, Kind.VALUES) and not lossy:
        raise ConfigError(
            f"experts are {kind}, of which MXFP4 keeps half the bits; allowed: lossy=True (--lossy), or 'fp8'"
        )
    return TARGETS[chosen](lossy)


def scales_of(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32; exponents, also as bytes, as the powers of two that they mean."""
    if scales.dtype is torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()


def fp8_of(stored: StoredMatrix, device: torch.device, lossy: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes ``[rows, columns]`` and float32 scales ``[rows / 128, columns / 128]``, on a device."""
    codes, scales = stored.codes.to(device), stored.scales
    if scales is None or stored.kind is Kind.FP8_CHANNEL:
        return quantize_weights(values_of(stored, device))
    if stored.kind is Kind.MXFP4:
        return fp8_from_mxfp4(codes, scales.to(device), rounding="nearest" if lossy else None)
    blocks = scales_of(scales).to(device)
    return codes, blocks.reshape(1, 1).expand(FP8.scale_shape(*codes.shape)) if blocks.numel() == 1 else blocks


def mxfp4_of(stored: StoredMatrix, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 ``[rows, columns / 2]``, low nibble first, and e8m0 exponents ``[rows, columns / 32]``."""
    if stored.kind is Kind.MXFP4:
        assert stored.scales is not None
        return stored.codes.view(torch.uint8).to(device), stored.scales.view(torch.float8_e8m0fnu).to(device)
    return quantize_mxfp4(values_of(stored, device))


def quantize_mxfp4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values ``[rows, columns]`` as MXFP4: each group of 32 has the exponent of its largest value, less that of 6.

    Codes are rounded to nearest, ties to even, and saturate.

    Raises:
        ConfigError: a value is infinite or NaN, which codes cannot be.
    """
    if not bool(values.isfinite().all()):
        row, column = (int(i) for i in (~values.isfinite()).nonzero()[0])
        raise ConfigError(
            f"values[{row}, {column}] is {float(values[row, column])}; allowed: finite values, or another format"
        )
    rows, columns = values.shape
    groups = values.float().reshape(rows, columns // MXFP4.group, MXFP4.group)
    _, exponents = torch.frexp(groups.abs().amax(-1))  # of 0.5 to 1
    shared = (exponents - 1 - _TOP).clamp(-_BIAS, _MOST - _BIAS)
    scaled = torch.ldexp(groups, -shared.unsqueeze(-1))
    size = scaled.abs().clamp(max=mxfp4.MAGNITUDES[-1])
    # below 2 in steps of a half, to 4 of one, then of two
    code = torch.where(size < 2, (size * 2).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    code = code.to(torch.uint8) | torch.signbit(scaled).to(torch.uint8) << 3
    pairs = code.reshape(rows, columns // 2, 2)
    e8m0 = (shared + _BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)
    return pairs[..., 0] | pairs[..., 1] << 4, e8m0


def values_of(stored: StoredMatrix, device: torch.device) -> torch.Tensor:
    """The values, float32 ``[rows, columns]`` unless they are stored as values, on a device."""
    codes = stored.codes.to(device)
    if stored.scales is None:
        return codes
    if stored.kind is Kind.FP8_CHANNEL:
        return codes.float() * scales_of(stored.scales).to(device).reshape(-1, 1)
    if stored.kind is Kind.MXFP4:
        return mxfp4.dequantize(codes, stored.scales.to(device))
    return dequantize_weights(*(each.contiguous() for each in fp8_of(stored, device)))
