"""FP8 quantisers: one scale per token per 128 columns for activations, per 128 x 128 block for weights.

Every scale is ``max(amax, 1e-10) / 448`` in float32 and every code is ``clamp(value / scale, -448, 448)``
rounded to nearest even in e4m3.  A NaN stays a NaN; an infinity makes its own group NaN or zero and nothing
else.
"""

from __future__ import annotations

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import BLOCK

__all__ = [
    "AMAX_FLOOR",
    "E4M3_MAX",
    "dequantize_activations",
    "dequantize_weights",
    "quantize_activations",
    "quantize_weights",
    "require_tensor",
]

E4M3_MAX = 448.0  #: largest finite value of float8_e4m3fn
AMAX_FLOOR = 1e-10  #: keeps the scale of an all-zero group positive


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def require_tensor(name: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is a tensor."""
    _require(isinstance(value, torch.Tensor), f"{name}: {type(value).__name__} given; allowed: a torch.Tensor")


def _encode(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Saturating e4m3 codes of `values / scales`; both float32, broadcast together."""
    return (values / scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _scale(amax: torch.Tensor) -> torch.Tensor:
    return amax.clamp(min=AMAX_FLOOR) / E4M3_MAX


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows in groups of 128 columns.

    Args:
        x: ``[T, H]``, any floating dtype, H a multiple of 128.

    Returns:
        Codes float8_e4m3fn ``[T, H]`` and scales float32 ``[T, H / 128]``.
    """
    require_tensor("activations", x)
    _require(x.ndim == 2, f"activations have {x.ndim} dimensions; allowed: 2, [tokens, hidden]")
    _require(x.is_floating_point(), f"activations are {x.dtype}; allowed: a floating dtype")
    tokens, hidden = x.shape
    _require(hidden > 0 and hidden % BLOCK == 0, f"hidden = {hidden} is not supported; allowed: a multiple of 128")
    groups = x.float().reshape(tokens, hidden // BLOCK, BLOCK)
    scales = _scale(groups.abs().amax(dim=-1))
    return _encode(groups, scales.unsqueeze(-1)).reshape(tokens, hidden), scales


def dequantize_activations(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Inverse of `quantize_activations` up to rounding.

    Args:
        codes: float8_e4m3fn ``[T, H]``.
        scales: float32 ``[T, H / 128]``.

    Returns:
        float32 ``[T, H]``.
    """
    require_tensor("codes of activations", codes)
    require_tensor("scales of activations", scales)
    tokens, hidden = codes.shape
    groups = codes.float().view(tokens, hidden // BLOCK, BLOCK)
    return (groups * scales.float().unsqueeze(-1)).view(tokens, hidden)


def quantize_weights(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise matrices in blocks of 128 x 128, one matrix at a time so that scratch stays small.

    Args:
        w: ``[..., N, K]``, any floating dtype, N and K multiples of 128.

    Returns:
        Codes float8_e4m3fn ``[..., N, K]`` and scales float32 ``[..., N / 128, K / 128]``.
    """
    require_tensor("weights", w)
    _require(w.ndim >= 2, f"weights have {w.ndim} dimensions; allowed: 2 or more, [..., N, K]")
    _require(w.is_floating_point(), f"weights are {w.dtype}; allowed: a floating dtype")
    *lead, n, k = w.shape
    _require(
        n > 0 and n % BLOCK == 0 and k > 0 and k % BLOCK == 0,
        f"weight matrix {n} x {k} is not supported; allowed: multiples of 128 in both directions",
    )
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    scales = torch.empty((*lead, n // BLOCK, k // BLOCK), dtype=torch.float32, device=w.device)
    flat_codes, flat_scales = codes.view(-1, n, k), scales.view(-1, n // BLOCK, k // BLOCK)
    for i, matrix in enumerate(w.reshape(-1, n, k)):
        blocks = matrix.float().reshape(n // BLOCK, BLOCK, k // BLOCK, BLOCK)
        scale = _scale(blocks.abs().amax(dim=(1, 3)))
        flat_scales[i] = scale
        flat_codes[i] = _encode(blocks, scale[:, None, :, None]).reshape(n, k)
    return codes, scales


def dequantize_weights(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Inverse of `quantize_weights` up to rounding.

    Args:
        codes: float8_e4m3fn ``[..., N, K]``.
        scales: float32 ``[..., N / 128, K / 128]``.

    Returns:
        float32 ``[..., N, K]``.
    """
    require_tensor("codes of weights", codes)
    require_tensor("scales of weights", scales)
    *lead, n, k = codes.shape
    blocks = codes.float().reshape(*lead, n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    return (blocks * scales.float()[..., :, None, :, None]).reshape(*lead, n, k)
