"""FP8 quantisers: one scale per token per 128 columns for activations, per 128 x 128 block for weights.

Every scale is ``max(amax, 1e-10) / 448`` in float32 and every code is ``clamp(value / scale, -448, 448)``
rounded to nearest even in e4m3.  A NaN stays a NaN; an infinity makes its own group NaN or zero and nothing
else.
"""

from __future__ import annotations

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import BLOCK

E4M3_MAX = 448.0  #: largest finite value of float8_e4m3fn
AMAX_FLOOR = 1e-10  #: keeps the scale of an all-zero group positive


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _require_values(name: str, tensor: torch.Tensor) -> None:
    fits = tensor.is_floating_point() and tensor.itemsize > 1
    _require(fits, f"{name} are {tensor.dtype}; allowed: bfloat16 or wider; codes go with their scales, as a pair")


def _require_pair(
    name: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    ndim: str,
    block: tuple[int, int],
    types: tuple[torch.dtype, ...] = (torch.float8_e4m3fn,),
) -> None:
    """What quantisers give: codes, and a scale for each block of the last two dimensions."""
    require_tensor(f"codes of {name}", codes)
    require_tensor(f"scales of {name}", scales)
    _require(
        codes.dtype in types and scales.dtype is torch.float32,
        f"codes of {name} are {codes.dtype}, scales {scales.dtype}; "
        f"allowed: {' or '.join(str(each).removeprefix('torch.') for each in types)} and float32",
    )
    *lead, rows, columns = codes.shape if codes.ndim >= 2 else (-1, -1)
    expected = (*lead, rows // block[0], columns // block[1])
    _require(
        rows % block[0] == 0 == columns % block[1] and tuple(scales.shape) == expected,
        f"codes of {name} have shape {tuple(codes.shape)}, scales {tuple(scales.shape)}; allowed: {ndim}, "
        f"and a scale for every {block[0]} x {block[1]}",
    )


def require_tensor(name: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is a tensor with a number at each place: dense, not nested, not quantised."""
    _require(isinstance(value, torch.Tensor), f"{name}: {type(value).__name__} given; allowed: a torch.Tensor")
    assert isinstance(value, torch.Tensor)
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:  # all that torch.compile sees of it
        odd = "nested" if value.is_nested else "quantized" if value.is_quantized else value.layout
        raise ConfigError(f"{name} is a {odd} tensor; allowed: a dense one (torch.strided)")


def _encode(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Saturating e4m3 codes of `values / scales`; both float32, broadcast together."""
    return (values / scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _scale(amax: torch.Tensor) -> torch.Tensor:
    # by a tensor: on a GPU torch divides by a number by multiplying with its inverse, which is not always rounded alike
    return amax.clamp(min=AMAX_FLOOR) / torch.full((), E4M3_MAX, dtype=torch.float32, device=amax.device)


@torch.no_grad()  # inference alone: a graph would keep the values alive in what is returned
def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows in groups of 128 columns.

    Args:
        x: ``[T, H]``, float16, bf16 or wider, H a multiple of 128; on any device.

    Returns:
        Codes float8_e4m3fn ``[T, H]`` and scales float32 ``[T, H / 128]``.

    Raises:
        ConfigError: the shape or the dtype is not supported.
    """
    require_tensor("activations", x)
    _require(x.ndim == 2, f"activations have {x.ndim} dimensions; allowed: 2, [tokens, hidden]")
    _require_values("activations", x)
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

    Raises:
        ConfigError: a shape or a dtype is not supported, or the two do not fit.
    """
    _require_pair("activations", codes, scales, "[tokens, hidden]", (1, BLOCK))
    _require(codes.ndim == 2, f"codes of activations have {codes.ndim} dimensions; allowed: 2, [tokens, hidden]")
    tokens, hidden = codes.shape
    groups = codes.float().view(tokens, hidden // BLOCK, BLOCK)
    return (groups * scales.float().unsqueeze(-1)).view(tokens, hidden)


@torch.no_grad()
def quantize_weights(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise matrices in blocks of 128 x 128, one matrix at a time so that scratch stays small.

    Args:
        w: ``[..., N, K]``, float16, bf16 or wider, N and K multiples of 128; on any device.

    Returns:
        Codes float8_e4m3fn ``[..., N, K]`` and scales float32 ``[..., N / 128, K / 128]``.

    Raises:
        ConfigError: the shape or the dtype is not supported.
    """
    require_tensor("weights", w)
    _require(w.ndim >= 2, f"weights have {w.ndim} dimensions; allowed: 2 or more, [..., N, K]")
    _require_values("weights", w)
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
        codes: float8_e4m3fn or float8_e5m2 ``[..., N, K]``.
        scales: float32 ``[..., N / 128, K / 128]``.

    Returns:
        float32 ``[..., N, K]``.

    Raises:
        ConfigError: a shape or a dtype is not supported, or the two do not fit.
    """
    types = torch.float8_e4m3fn, torch.float8_e5m2
    _require_pair("weights", codes, scales, "[..., N, K]", (BLOCK, BLOCK), types)
    *lead, n, k = codes.shape
    blocks = codes.float().reshape(*lead, n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    return (blocks * scales.float()[..., :, None, :, None]).reshape(*lead, n, k)
