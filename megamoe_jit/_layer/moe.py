"""`MegaMoE`: a layer that owns its buffer and its weights, for callers who want one object and bf16 in and out."""

from __future__ import annotations

import copy
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.calls import fp8_mega_moe, get_symm_buffer_for_mega_moe
from megamoe_jit._layer.checks import check_tensor
from megamoe_jit._layer.marks import require_plain
from megamoe_jit._layer.quantize import quantize_activations, quantize_weights, require_tensor
from megamoe_jit._layer.weights import (
    WeightPair,
    mark_transformed,
    readable_scales,
    require_pair,
    transform_weights_for_mega_moe_sm90,
)
from megamoe_jit._spec import check_clamp, check_flag
from megamoe_jit._spec.formats import FP8

__all__ = ["MegaMoE"]


_FLOATS, _FLOATING = (torch.bfloat16, torch.float16, torch.float32), "bfloat16, float16 or float32"
_INTEGERS = torch.int64, torch.int32


def _matrices(name: str, weights: torch.Tensor | WeightPair) -> torch.Tensor:
    """The values, or the codes of a pair; raises unless there is one matrix for each expert."""
    if not isinstance(weights, torch.Tensor):
        require_pair(name, weights)
        weights = weights[0]
    elif weights.dtype not in _FLOATS:
        raise ConfigError(f"{name} has dtype {weights.dtype}; allowed: {_FLOATING}, or a pair of codes and scales")
    if weights.ndim != 3:
        raise ConfigError(f"{name} has {weights.ndim} dimensions; allowed: 3")
    return weights


def _own(name: str, weights: torch.Tensor | WeightPair, device: torch.device, inplace: bool) -> WeightPair:
    """Codes that may be written over, and scales; raises before that for what a call would refuse."""
    if isinstance(weights, torch.Tensor):
        return quantize_weights(weights)
    codes, scales = weights
    if inplace:
        check_tensor(f"{name} codes", codes, FP8.code_dtype, codes.shape, device)
    experts, rows, depth = codes.shape
    scales, blocks = readable_scales(scales), (experts, *FP8.scale_shape(rows, depth))
    check_tensor(f"{name} scales", scales, FP8.scale_dtype, blocks, device, align=4)
    require_plain(name, codes)  # a copy has no mark
    return (codes if inplace else codes.clone(memory_format=torch.contiguous_format)), scales


class MegaMoE:
    """One MoE layer on one GPU: floating-point tensors in, bf16 out.

    Args:
        w13: gate rows then up rows of each expert: bf16, float16 or float32 ``[experts, 2 * intermediate, hidden]``
            on a CUDA device, which is then the layer's; or a pair of e4m3 codes of that shape and float32 scales
            ``[experts, 2 * intermediate / 128, hidden / 128]``. Sizes are multiples of 128.
        w2: ``[experts, hidden, intermediate]``, and scales ``[experts, hidden / 128, intermediate / 128]``, likewise.
        topk: slots of a token, 1 to 32.
        max_tokens: most tokens of a call, 1 to 32768; the capacity is rounded up to a multiple of 128.
        clamp: bounds the gate from above and the up projection on both sides, above 0; None for no bound.
        fast_math: approximate exponential and reciprocal in SwiGLU; nothing else changes.
        inplace: bring the codes of pairs into the kernel's order where they are, instead of in a copy.

    Attributes:
        buffer: the layer's `SymmBuffer`.
        l1: e4m3 codes of `w13` in the kernel's order, and their float32 scales.
        l2: the same of `w2`.

    Raises:
        ConfigError: a shape, dtype or value is not supported, or the memory is not there (says the bytes).
        UnsupportedDeviceError: there is no GPU, or it is no Hopper GPU.

    Example:
        >>> layer = MegaMoE(w13, w2, topk=6, max_tokens=4096)
        >>> y = layer(x, topk_idx, topk_weights)
    """

    @torch.no_grad()
    def __init__(
        self,
        w13: torch.Tensor | WeightPair,
        w2: torch.Tensor | WeightPair,
        *,
        topk: int,
        max_tokens: int,
        clamp: float | None = None,
        fast_math: bool = True,
        inplace: bool = False,
    ) -> None:
        gate_up, down = _matrices("w13", w13), _matrices("w2", w2)
        experts, rows, hidden = gate_up.shape
        if rows % 2:
            raise ConfigError(f"w13 has {rows} rows; allowed: gate rows and as many up rows")
        if down.shape != (experts, hidden, rows // 2):
            raise ConfigError(
                f"w2 has shape {tuple(down.shape)}; allowed: {(experts, hidden, rows // 2)}, "
                f"to fit w13 {tuple(gate_up.shape)}"
            )
        check_clamp("clamp", clamp)
        check_flag("fast_math", fast_math)
        check_flag("inplace", inplace)
        self.clamp, self.fast_math = clamp, fast_math
        self.buffer = get_symm_buffer_for_mega_moe(  # it refuses sizes and devices before weights are quantised
            None, experts, max_tokens, topk, hidden, rows // 2, device=gate_up.device
        )
        try:
            with torch.inference_mode(False), torch.no_grad():  # experts made in it could not be exchanged outside
                l1, l2 = (_own(name, w, gate_up.device, inplace) for name, w in (("w13", w13), ("w2", w2)))
                self.l1, self.l2 = transform_weights_for_mega_moe_sm90(l1, l2, inplace=True)
        except BaseException:
            self.buffer.destroy()
            raise

    @torch.no_grad()  # a copy that is recorded makes the buffer's views parts of a graph that grows with every call
    def stage(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> int:
        """Quantise and copy the inputs of a call into the buffer, once the last call has read its own.

        Args:
            x: bf16, float16 or float32 ``[T, hidden]``.
            topk_idx: int64 or int32 ``[T, topk]``, -1 for a masked slot.
            topk_weights: bf16, float16 or float32 ``[T, topk]``.

        Returns:
            T, the number of tokens.

        Raises:
            ConfigError: a shape, dtype, device or number of tokens is not supported, or the layer was destroyed.
            DeviceFaultError: an earlier call failed.
        """
        self.buffer.require_usable()
        require_tensor("x", x)
        hidden, topk = self.buffer.hidden, self.buffer.num_topk
        if x.ndim != 2:
            raise ConfigError(f"x has shape {tuple(x.shape)}; allowed: [tokens, {hidden}]")
        tokens = x.shape[0]
        if tokens > self.buffer.num_max_tokens_per_rank:
            raise ConfigError(
                f"x has {tokens} tokens; allowed: at most {self.buffer.num_max_tokens_per_rank}, the layer's max_tokens"
            )
        for name, tensor, width, floating in (
            ("x", x, hidden, True),
            ("topk_idx", topk_idx, topk, False),
            ("topk_weights", topk_weights, topk, True),
        ):
            require_tensor(name, tensor)
            if tensor.shape != (tokens, width):
                raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; allowed: {(tokens, width)}")
            if tensor.dtype not in (_FLOATS if floating else _INTEGERS):
                allowed = _FLOATING if floating else "int64 or int32"
                raise ConfigError(f"{name} has dtype {tensor.dtype}; allowed: {allowed}")
            if tensor.device != self.buffer.device:
                raise ConfigError(f"{name} is on {tensor.device}; allowed: {self.buffer.device}, where the layer is")
        self.buffer.wait_for_last()
        codes, scales = quantize_activations(x)
        self.buffer.x[:tokens].copy_(codes)
        self.buffer.x_sf[:tokens].copy_(scales)
        self.buffer.topk_idx[:tokens].copy_(topk_idx)
        self.buffer.topk_weights[:tokens].copy_(topk_weights)
        return tokens

    def __call__(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Run the layer.

        Args:
            x: bf16, float16 or float32 ``[T, hidden]``.
            topk_idx: int64 or int32 ``[T, topk]``, -1 for a masked slot.
            topk_weights: bf16, float16 or float32 ``[T, topk]``.

        Returns:
            bf16 ``[T, hidden]``, a new tensor; the kernel may still be running.

        Raises:
            ConfigError: an argument is not supported, or the layer was destroyed; nothing was launched.
            CaptureError: first use of this kernel during CUDA-graph capture.
            DeviceFaultError: an earlier call failed.
            MegaMoeError: the kernel could not be compiled, loaded or launched; see `fp8_mega_moe`.
        """
        with self.buffer.lock:  # another thread's inputs come after this call
            tokens = self.stage(x, topk_idx, topk_weights)
            y = torch.empty(tokens, self.buffer.hidden, dtype=torch.bfloat16, device=x.device)
            fp8_mega_moe(y, self.l1, self.l2, self.buffer, activation_clamp=self.clamp, fast_math=self.fast_math)
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> MegaMoE:
        """A layer with weights and a buffer of its own."""
        buffer = self.buffer
        buffer.require_usable()
        shape = buffer.shape
        made = memo[id(self)] = object.__new__(type(self))
        more = {name: value for name, value in vars(self).items() if name not in ("l1", "l2", "buffer")}
        made.__dict__.update(copy.deepcopy(more, memo))
        made.buffer = get_symm_buffer_for_mega_moe(
            *(None, shape.experts, buffer.num_max_tokens_per_rank, shape.topk, shape.hidden, shape.intermediate),
            device=buffer.device,
        )
        try:
            made.l1, made.l2 = ((codes.clone(), scales.clone()) for codes, scales in (self.l1, self.l2))
            mark_transformed(made.l1, made.l2)
        except BaseException:
            made.buffer.destroy()
            raise
        return made

    def check(self) -> None:
        """Wait for the device and raise if a kernel of this layer gave up.

        Raises:
            DeviceFaultError: a wait inside a kernel passed its deadline, or the CUDA context is broken.
            CaptureError: some stream is capturing, so that the device cannot be waited for; nothing is wrong.
        """
        self.buffer.check()

    def destroy(self) -> None:
        """Wait for the device and give the buffer back; safe to call twice.

        Raises:
            CaptureError: some stream is capturing, so that the device cannot be waited for; nothing was given back.
        """
        self.buffer.destroy()
