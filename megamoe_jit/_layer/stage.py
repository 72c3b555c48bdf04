"""Staging by a kernel: activations to FP8 codes and scales, ids and router weights as the layer's kernel reads them."""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_float, c_uint32, c_uint64

import torch

from megamoe_jit._device.launch import Launcher
from megamoe_jit._device.load import load_kernel
from megamoe_jit._device.params import PARAMS_ALIGN
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.quantize import require_tensor
from megamoe_jit._spec import BLOCK
from megamoe_jit._stage_spec import StageFormat, StageSpec

__all__ = ["Outputs", "StageKernel", "StageParams", "launch_stage", "raw_formats", "stage_kernel"]

THREADS = 256
BLOCKS_PER_SM = 6  #: as many as fit

_FORMATS = {
    torch.bfloat16: StageFormat.BF16,
    torch.float16: StageFormat.F16,
    torch.float32: StageFormat.F32,
    torch.float8_e4m3fn: StageFormat.E4M3,
}
_IDS = {torch.int32: 0, torch.int64: 1}  #: bits of `RawFormats` in kernels_src/stage/inputs.cuh
_WEIGHTS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 4}
_SCALES_E8M0, _SCALES_PACKED = 8, 16


class StageParams(ctypes.Structure):
    """`megamoe::StageParams` of kernels_src/kernels/stage.cuh.  Pointers are plain integers."""

    _fields_ = [
        ("x", c_uint64),
        ("ids", c_uint64),
        ("weights", c_uint64),
        ("x_scales", c_uint64),
        ("out_x", c_uint64),
        ("out_scales", c_uint64),
        ("out_ids", c_uint64),
        ("out_weights", c_uint64),
        ("x_stride", c_uint64),
        ("scales_row", c_uint64),
        ("scales_column", c_uint64),
        ("ids_stride", c_uint32),
        ("weights_stride", c_uint32),
        ("formats", c_uint32),
        ("tokens", c_uint32),
        ("masked", c_uint32),
        ("hidden", c_uint32),
        ("topk", c_uint32),
        ("weight_factor", c_float),
        ("unused", c_uint32 * 2),
    ]


def raw_formats(ids: torch.Tensor, weights: torch.Tensor) -> int:
    """How a kernel reads these; raises `KeyError` with a dtype that it cannot."""
    return _IDS[ids.dtype] | _WEIGHTS[weights.dtype]


class StageKernel:
    """The staging kernel of one format on one device; one call at a time."""

    def __init__(self, form: StageFormat, device_index: int) -> None:
        memory = (ctypes.c_char * (ctypes.sizeof(StageParams) + PARAMS_ALIGN))()
        self.params = StageParams.from_buffer(memory, -ctypes.addressof(memory) % PARAMS_ALIGN)
        loaded = load_kernel(StageSpec(form), device_index, param_bytes=ctypes.sizeof(StageParams))
        self.launcher = Launcher(loaded, self.params, threads=THREADS, cooperative=False)
        self.lock = threading.Lock()
        self._most = BLOCKS_PER_SM * torch.cuda.get_device_properties(device_index).multi_processor_count

    def blocks(self, tokens: int, masked: int, hidden: int, topk: int) -> int:
        """Blocks of a launch: a warp for every two groups of 128 columns, a thread for every pair, if they fit."""
        rows = -(-tokens * (hidden // BLOCK) // (THREADS // 16))
        return max(1, min(self._most, rows + -(-masked * topk // THREADS)))

    def launch(self, stream: int) -> None:
        """Enqueue it with the parameters as they are now."""
        params = self.params
        blocks = self.blocks(params.tokens, params.masked, params.hidden, params.topk)
        self.launcher.launch(blocks, stream)


_kernels: dict[tuple[torch.dtype, int], StageKernel] = {}


def stage_kernel(dtype: torch.dtype, device_index: int) -> StageKernel:
    """The kernel for activations of this dtype, loaded if it was not."""
    kernel = _kernels.get((dtype, device_index))
    if kernel is None:
        with torch.cuda.device(device_index):
            kernel = _kernels.setdefault((dtype, device_index), StageKernel(_FORMATS[dtype], device_index))
    return kernel


def _scales(x_scales: torch.Tensor | None, tokens: int, hidden: int) -> tuple[int, int, int]:
    """Bits, row and column stride in bytes of the scales that came with codes."""
    if x_scales is None:
        raise ConfigError("x is float8_e4m3fn without x_scales; allowed: codes with their scales")
    blocks, dtype = hidden // BLOCK, x_scales.dtype
    packed = dtype is torch.int32
    if packed and blocks % 4:
        raise ConfigError(f"x_scales packed in int32 with hidden = {hidden}; allowed: a multiple of 512")
    if dtype not in (torch.float32, torch.int32, torch.float8_e8m0fnu):
        raise ConfigError(f"x_scales has dtype {dtype}; allowed: float32, float8_e8m0fnu, int32 (four exponents each)")
    shape = (tokens, blocks // 4 if packed else blocks)
    if x_scales.shape != shape:
        raise ConfigError(f"x_scales has shape {tuple(x_scales.shape)}; allowed: {shape}")
    size = x_scales.element_size()
    bits = (0 if dtype is torch.float32 else _SCALES_E8M0) | (_SCALES_PACKED if packed else 0)
    return bits, x_scales.stride(0) * size, x_scales.stride(1) * size


def _check_inputs(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, hidden: int, topk: int, device: torch.device
) -> int:
    """The number of tokens; raises `ConfigError` unless these are a batch's inputs on `device`."""
    try:
        given = (x.dtype, topk_idx.dtype, topk_weights.dtype)
        fits = given[0] in _FORMATS and given[1] in _IDS and given[2] in _WEIGHTS
        tokens = x.shape[0] if x.dim() == 2 else -1
        fits = fits and x.shape == (tokens, hidden) and topk_idx.shape == (tokens, topk) == topk_weights.shape
        fits = fits and x.device == topk_idx.device == topk_weights.device == device
    except AttributeError:
        fits, tokens = False, -1
    if not fits:
        _explain(x, topk_idx, topk_weights, hidden, topk, device)
    return tokens


def _explain(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, hidden: int, topk: int, device: torch.device
) -> None:
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


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if its numbers of a row are not side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class Outputs:
    """Where staging writes: views of a buffer, or tensors of the caller; addresses are read once."""

    __slots__ = ("addresses", "device", "hidden", "rows", "topk")

    def __init__(self, x: torch.Tensor, x_sf: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        self.addresses = (x.data_ptr(), x_sf.data_ptr(), topk_idx.data_ptr(), topk_weights.data_ptr())
        self.rows, self.hidden = x.shape
        self.topk = topk_idx.shape[1]
        self.device = x.device


def launch_stage(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    out: Outputs,
    tokens: int,
    masked: int,
    weight_factor: float,
    x_scales: torch.Tensor | None = None,
) -> None:
    """Enqueue the staging of checked inputs on the current stream.

    Args:
        x, topk_idx, topk_weights: the inputs; rows from `tokens` on are not read.
        out: where to.
        tokens: rows that are tokens.
        masked: rows of ids and weights to write: those from `tokens` on get -1 and 0.
        weight_factor: router weights are multiplied with it.
        x_scales: of codes.
    """
    x, topk_idx, topk_weights = _rows(x), _rows(topk_idx), _rows(topk_weights)
    index = out.device.index
    kernel = stage_kernel(x.dtype, index)
    size = x.element_size()
    formats, scales_row, scales_column, scales_at = raw_formats(topk_idx, topk_weights), 0, 0, 0
    if size == 1:
        bits, scales_row, scales_column = _scales(x_scales, x.shape[0], out.hidden)
        assert x_scales is not None
        formats, scales_at = formats | bits, x_scales.data_ptr()
        if (x.data_ptr() | x.stride(0)) % 16:
            x = x.contiguous().clone()
    with kernel.lock:
        params = kernel.params
        params.x, params.ids, params.weights = x.data_ptr(), topk_idx.data_ptr(), topk_weights.data_ptr()
        params.x_scales, params.scales_row, params.scales_column = scales_at, scales_row, scales_column
        params.out_x, params.out_scales, params.out_ids, params.out_weights = out.addresses
        params.x_stride = x.stride(0) * size
        params.ids_stride, params.weights_stride = topk_idx.stride(0), topk_weights.stride(0)
        params.formats, params.tokens, params.masked = formats, tokens, masked
        params.hidden, params.topk, params.weight_factor = out.hidden, out.topk, weight_factor
        kernel.launch(torch._C._cuda_getCurrentRawStream(index))
