"""Staging: a batch as a model has it into the buffer of a layer, in one launch."""

from __future__ import annotations

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.checks import check_tensor
from megamoe_jit._layer.quantize import require_tensor
from megamoe_jit._layer.raw_inputs import RawInputs, check_rows
from megamoe_jit._layer.stage_kernel import Outputs, launch_stage
from megamoe_jit._spec import BLOCK
from megamoe_jit._spec.checks import check


def require_buffer(buffer: object) -> SymmBuffer:
    """The buffer; raises `ConfigError` if it is none."""
    if not isinstance(buffer, SymmBuffer):
        given = type(buffer).__name__
        raise ConfigError(f"sym_buffer: {given} given; allowed: a SymmBuffer, of get_symm_buffer_for_mega_moe(...)")
    return buffer


def require_gpu(name: str, device: torch.device) -> None:
    """Raise `ConfigError` unless this is a GPU."""
    if device.type != "cuda":
        raise ConfigError(f"{name} is on {device}; allowed: a CUDA device")


def stage(
    buffer: SymmBuffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    x_scales: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    padded_tokens: int | None = None,
) -> int:
    """Quantise a batch into a buffer, in one kernel launch on the current stream, after the buffer's last call.

    Codes and scales are those of `quantize_activations`, bit for bit; of activations that are codes already they are
    copied. Rows may lie at any distance; where the numbers of a row are not side by side, a copy is made first.

    Args:
        buffer: the layer's.
        x: bf16, float16 or float32 ``[T, hidden]``; or e4m3 codes with their `x_scales`.
        topk_idx: int64 or int32 ``[T, topk]``, -1 for a masked slot.
        topk_weights: bf16, float16 or float32 ``[T, topk]``.
        x_scales: of codes: float32 or float8_e8m0fnu ``[T, hidden / 128]``, or int32 ``[T, hidden / 512]`` of four
            exponents each, the first in the lowest byte; with any strides.
        routed_scaling_factor: router weights are multiplied with it.
        padded_tokens: rows of the call to come, T to the capacity; those past T are masked. T by default. They
            still go to shared experts, with whatever lies in `buffer.x`: then their rows of `y` mean nothing.

    Returns:
        The rows that are ready: `padded_tokens`, or T.

    Raises:
        ConfigError: an argument is not supported, or the buffer was destroyed; nothing was launched.
        CaptureError: first use of this kernel during CUDA-graph capture.
        DeviceFaultError: an earlier call on this buffer failed.
        MegaMoeError: the kernel could not be compiled, loaded or launched; see `fp8_mega_moe`.
    """
    require_buffer(buffer)
    buffer.require_usable()
    raw = buffer.read_inputs(x, topk_idx, topk_weights, x_scales, routed_scaling_factor)
    rows = raw.tokens
    if padded_tokens is not None:
        check_rows("padded_tokens", padded_tokens, raw.tokens, buffer.num_max_tokens_per_rank)
        rows = padded_tokens
    buffer.stage_inputs(raw, rows)
    return rows


def mega_moe_pre_dispatch_sm90(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    buf_x: torch.Tensor,
    buf_x_sf: torch.Tensor,
    buf_topk_idx: torch.Tensor,
    buf_topk_weights: torch.Tensor,
    num_tokens: int,
    group_size: int = 128,
    routed_scaling_factor: float = 1.0,
) -> None:
    """`stage` by the name, and with the parameters, that DeepGEMM has: from plain tensors to plain tensors.

    All rows of `buf_topk_idx` past `num_tokens` are masked, so that a call may have any number of rows up to those, one
    with no tokens too. A buffer's last call is not waited for where it was on another stream: see
    `SymmBuffer.wait_for_last`.

    Args:
        x: bf16, float16 or float32 ``[num_tokens or more, hidden]``.
        topk_idx: int64 or int32 ``[num_tokens or more, topk]``, -1 for a masked slot.
        topk_weights: bf16, float16 or float32 ``[num_tokens or more, topk]``.
        buf_x: e4m3 ``[capacity, hidden]``, written; such as a buffer's `x`, or its first rows.
        buf_x_sf: float32 ``[capacity, hidden / 128]``, written.
        buf_topk_idx: int64 ``[rows, topk]``, written; at least `num_tokens` rows, and no more than the capacity.
        buf_topk_weights: float32 ``[rows, topk]``, written.
        num_tokens: rows that are tokens.
        group_size: columns of a scale; must be 128.
        routed_scaling_factor: router weights are multiplied with it.

    Raises:
        ConfigError: an argument is not supported; nothing was launched.
        CaptureError: first use of this kernel during CUDA-graph capture.
        MegaMoeError: the kernel could not be compiled, loaded or launched; see `fp8_mega_moe`.
    """
    check(type(group_size) is int and group_size == BLOCK, "group_size", group_size, str(BLOCK))
    require_tensor("buf_x_sf", buf_x_sf)
    require_tensor("buf_topk_weights", buf_topk_weights)
    for name, tensor in (("buf_x", buf_x), ("buf_topk_idx", buf_topk_idx)):
        require_tensor(name, tensor)
        if tensor.ndim != 2:
            raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; allowed: two dimensions, rows and columns")
    (capacity, hidden), (rows, topk), device = buf_x.shape, buf_topk_idx.shape, buf_x.device
    require_gpu("buf_x", device)
    if hidden == 0 or hidden % BLOCK:
        raise ConfigError(f"buf_x has {hidden} columns; allowed: a multiple of {BLOCK}")
    check_tensor("buf_x", buf_x, torch.float8_e4m3fn, (capacity, hidden), device)
    check_tensor("buf_x_sf", buf_x_sf, torch.float32, (capacity, hidden // BLOCK), device)
    check_tensor("buf_topk_idx", buf_topk_idx, torch.int64, (rows, topk), device)
    check_tensor("buf_topk_weights", buf_topk_weights, torch.float32, (rows, topk), device)
    check_rows("num_tokens", num_tokens, 0, min(capacity, rows))
    given = []
    for name, tensor in (("x", x), ("topk_idx", topk_idx), ("topk_weights", topk_weights)):
        require_tensor(name, tensor)
        if tensor.ndim == 0 or tensor.shape[0] < num_tokens:
            raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; allowed: {num_tokens} rows or more")
        given.append(tensor[:num_tokens])
    raw = RawInputs(given[0], given[1], given[2], hidden, topk, device, weight_factor=routed_scaling_factor)
    launch_stage(raw, Outputs(buf_x, buf_x_sf, buf_topk_idx, buf_topk_weights), rows)
