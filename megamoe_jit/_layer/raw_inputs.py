"""`RawInputs`: a batch as the caller has it, checked once; what kernels need of it to stage it themselves."""

from __future__ import annotations

from typing import NoReturn

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.quantize import require_tensor
from megamoe_jit._spec import BLOCK
from megamoe_jit._spec.any_layer import StageFormat
from megamoe_jit._spec.checks import check, check_float32

_BF16 = StageFormat.BF16
_FORMATS = {  #: and bytes of a number
    torch.bfloat16: (_BF16, 2),
    torch.float16: (StageFormat.F16, 2),
    torch.float32: (StageFormat.F32, 4),
    torch.float8_e4m3fn: (StageFormat.E4M3, 1),
}
#: Bits of `RawFormats` in kernels_src/stage/inputs.cuh.
_IDS = {torch.int32: 0, torch.int64: 1}
_WEIGHTS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 4}
_SCALES_E8M0, _SCALES_PACKED = 8, 16
_SCALES = {torch.float32: 0, torch.float8_e8m0fnu: _SCALES_E8M0, torch.int32: _SCALES_E8M0 | _SCALES_PACKED}

_MOST = torch.finfo(torch.float32).max
_FURTHEST = (1 << 32) - 1  #: stride of ids and weights that a kernel can take


class RawInputs:
    """Activations, expert ids and router weights of a batch, in any format that kernels read.

    Args:
        x: ``[T, hidden]`` bf16, float16 or float32; or e4m3 codes, which come with `x_scales`. Rows at any distance.
        topk_idx: int64 or int32 ``[T, topk]``.
        topk_weights: bf16, float16 or float32 ``[T, topk]``.
        hidden, topk: as the layer has them.
        device: where the layer is.
        x_scales: of codes, float32 or float8_e8m0fnu ``[T, hidden / 128]``, or int32 ``[T, hidden / 512]`` of four
            exponents each; with any strides.
        weight_factor: router weights are multiplied with it.

    Attributes:
        tokens: T.
        form: format of the activations.
        fused: the layer's kernel can stage these itself: bf16, rows at multiples of 16 bytes.
        formats: bits of the other formats.
        x_at, ids_at, weights_at, scales_at: addresses.
        x_stride: bytes from row to row.
        ids_stride, weights_stride: numbers from row to row.
        scales_row, scales_column: bytes from row to row, from column to column.
        weight_factor: as given.
        topk_idx: as given, or a copy with the slots of a token side by side.

    Raises:
        ConfigError: one of them is not supported.
    """

    __slots__ = (
        "_kept", "form", "formats", "fused", "ids_at", "ids_stride", "scales_at", "scales_column", "scales_row",
        "tokens", "topk_idx", "weight_factor", "weights_at", "weights_stride", "x_at", "x_stride",
    )  # fmt: skip

    def __init__(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        hidden: int,
        topk: int,
        device: torch.device,
        x_scales: torch.Tensor | None = None,
        weight_factor: float = 1.0,
    ) -> None:
        try:
            form, size = _FORMATS[x.dtype]
            formats = _IDS[topk_idx.dtype] | _WEIGHTS[topk_weights.dtype]
            tokens, columns = x.shape
            pairs = (tokens, topk)
            fits = columns == hidden and topk_idx.shape == pairs == topk_weights.shape
            fits = fits and x.layout is topk_idx.layout is topk_weights.layout is torch.strided
            fits = fits and x.device == topk_idx.device == topk_weights.device == device
            x_row, x_column = x.stride()
            ids_row, ids_column = topk_idx.stride()
            weights_row, weights_column = topk_weights.stride()
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            fits = False
        if not fits:
            _explain(x, topk_idx, topk_weights, hidden, topk, device)
        if type(weight_factor) is not float or not -_MOST <= weight_factor <= _MOST:
            weight_factor = check_float32("routed_scaling_factor", weight_factor)
        self.tokens, self.weight_factor, self.form, self.formats = tokens, weight_factor, form, formats
        if ids_column != 1 or ids_row > _FURTHEST:
            topk_idx, ids_row = _copy(topk_idx), topk
        if weights_column != 1 or weights_row > _FURTHEST or topk_weights.is_neg():
            topk_weights, weights_row = _copy(topk_weights), topk
        if x_column != 1 or x.is_neg():
            x, x_row = _copy(x), hidden
        if size == 1:
            if (x.data_ptr() | x_row) & 15:
                x, x_row = _copy(x), hidden
            self._take_scales(x_scales, hidden, device)
        elif x_scales is not None:
            raise ConfigError(f"x is {x.dtype} with x_scales; allowed: float8_e4m3fn with its scales")
        at, step = x.data_ptr(), x_row * size
        self.x_at, self.ids_at, self.weights_at = at, topk_idx.data_ptr(), topk_weights.data_ptr()
        self.x_stride, self.ids_stride, self.weights_stride = step, ids_row, weights_row
        self.fused = form is _BF16 and not (at | step) & 15
        self.topk_idx, self._kept = topk_idx, (x, topk_weights)  # until it is launched: some may be copies

    def _take_scales(self, x_scales: torch.Tensor | None, hidden: int, device: torch.device) -> None:
        if x_scales is None:
            raise ConfigError("x is float8_e4m3fn without x_scales; allowed: codes with their scales")
        require_tensor("x_scales", x_scales)
        dtype, blocks = x_scales.dtype, hidden // BLOCK
        if dtype not in _SCALES:
            allowed = "float32, float8_e8m0fnu, int32 (four exponents each)"
            raise ConfigError(f"x_scales has dtype {dtype}; allowed: {allowed}")
        packed = dtype is torch.int32
        if packed and blocks % 4:
            raise ConfigError(f"x_scales packed in int32 with hidden = {hidden}; allowed: a multiple of 512")
        shape = (self.tokens, blocks // 4 if packed else blocks)
        if x_scales.shape != shape:
            raise ConfigError(f"x_scales has shape {tuple(x_scales.shape)}; allowed: {shape}")
        if x_scales.device != device:
            raise ConfigError(f"x_scales is on {x_scales.device}; allowed: {device}, where the layer is")
        size = x_scales.itemsize
        self.formats |= _SCALES[dtype]
        self.scales_at = x_scales.data_ptr()
        self.scales_row, self.scales_column = x_scales.stride(0) * size, x_scales.stride(1) * size


def _explain(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, hidden: int, topk: int, device: torch.device
) -> NoReturn:
    """Raise `ConfigError` for the first of these that is not what it must be."""
    require_tensor("x", x)
    if x.ndim != 2:
        raise ConfigError(f"x has shape {tuple(x.shape)}; allowed: [tokens, {hidden}]")
    tokens = x.shape[0]
    for name, tensor, width, dtypes, allowed in (
        ("x", x, hidden, _FORMATS, "bfloat16, float16 or float32; float8_e4m3fn with its scales"),
        ("topk_idx", topk_idx, topk, _IDS, "int64 or int32"),
        ("topk_weights", topk_weights, topk, _WEIGHTS, "bfloat16, float16 or float32"),
    ):
        require_tensor(name, tensor)
        if tensor.shape != (tokens, width):
            raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; allowed: {(tokens, width)}")
        if tensor.dtype not in dtypes:
            raise ConfigError(f"{name} has dtype {tensor.dtype}; allowed: {allowed}")
        if tensor.device != device:
            raise ConfigError(f"{name} is on {tensor.device}; allowed: {device}, where the layer is")
    raise ConfigError(f"x is {type(x).__name__}; allowed: plain tensors")


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers side by side."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def check_rows(name: str, rows: object, least: int, most: int) -> None:
    """Raise `ConfigError` unless this is a number of rows from `least` to `most`."""
    check(type(rows) is int and least <= rows <= most, name, rows, f"{least} to {most}")
