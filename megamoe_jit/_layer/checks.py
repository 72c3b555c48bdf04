"""Checks of what callers pass, before anything is launched: what it was, which value, what is allowed."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import torch

from megamoe_jit._errors import ConfigError, UnsupportedDeviceError
from megamoe_jit._layer.quantize import require_tensor
from megamoe_jit._layer.weights import require_pair
from megamoe_jit._spec import KernelSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["check_clamp", "check_device", "check_expert_ids", "check_recipe", "check_tensor", "check_weights"]

RECIPE = (128, 128, 128)


@functools.cache
def check_device(device: torch.device) -> None:
    """Raise unless `device` is a CUDA device of compute capability 9.0."""
    if device.type != "cuda":
        raise ConfigError(f"device = {device} is not supported; allowed: a CUDA device")
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        raise UnsupportedDeviceError(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; "
            "these kernels need 9.0 (Hopper: H100, H200, H800, H20, GH200)"
        )


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: Sequence[int],
    device: torch.device,
    *,
    align: int = 16,
) -> None:
    """Raise unless `tensor` has exactly this dtype, shape and device, is contiguous and aligned to `align` bytes."""
    try:
        given = tensor.dtype
    except AttributeError:
        require_tensor(name, tensor)
        raise
    if given is not dtype:
        raise ConfigError(f"{name} has dtype {given}; allowed: {dtype}")
    if tensor.shape != tuple(shape):
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; allowed: {tuple(shape)}")
    if tensor.device != device:
        raise ConfigError(f"{name} is on {tensor.device}; allowed: {device}, where the buffer is")
    if not tensor.is_contiguous():
        raise ConfigError(f"{name} has strides {tensor.stride()}; allowed: contiguous, row-major")
    if tensor.data_ptr() % align:
        raise ConfigError(f"{name} starts at {tensor.data_ptr():#x}; allowed: an address that is a multiple of {align}")


def check_weights(
    l1: tuple[torch.Tensor, torch.Tensor],
    l2: tuple[torch.Tensor, torch.Tensor],
    spec: KernelSpec,
    device: torch.device,
) -> None:
    """Raise unless both layers' transformed weights and scales fit the kernel."""
    require_pair("l1", l1)
    require_pair("l2", l2)
    experts, hidden, intermediate = spec.local_experts, spec.shape.hidden, spec.shape.intermediate
    stored = spec.weights
    for name, (codes, scales), size in (("l1", l1, (2 * intermediate, hidden)), ("l2", l2, (hidden, intermediate))):
        check_tensor(f"{name} weights", codes, stored.code_dtype, (experts, *stored.code_shape(*size)), device)
        check_tensor(f"{name} scales", scales, stored.scale_dtype, (experts, *stored.scale_shape(*size)), device)


def check_recipe(recipe: Sequence[int], activation: str, clamp: float | None) -> float:
    """Raise unless the options are the supported ones; the clamp as the kernel takes it (infinity for none)."""
    if recipe != RECIPE and (not isinstance(recipe, list) or tuple(recipe) != RECIPE):
        raise ConfigError(f"recipe = {recipe!r:.80} is not supported; allowed: {RECIPE}")
    if activation != "swiglu":
        raise ConfigError(f"activation = {activation!r} is not supported; allowed: 'swiglu'")
    return check_clamp("activation_clamp", clamp)


def check_clamp(name: str, clamp: float | None) -> float:
    """Raise unless this is a bound or None; as the kernel takes it (infinity for none)."""
    if clamp is None:
        return float("inf")
    try:
        bound = ctypes.c_float(clamp).value  # as the kernel has it
    except TypeError:
        bound = 0.0
    if not bound > 0:
        raise ConfigError(f"{name} = {clamp!r:.80} is not supported; allowed: a positive number or None")
    return bound


def check_expert_ids(topk_idx: torch.Tensor, num_experts: int) -> None:
    """Raise unless every id is -1 or an expert; synchronises, so only in debug mode."""
    bad = (topk_idx < -1) | (topk_idx >= num_experts)
    if bool(bad.any()):
        token, slot = (int(i) for i in bad.nonzero()[0])
        raise ConfigError(
            f"topk_idx[{token}, {slot}] = {int(topk_idx[token, slot])} is not an expert; "
            f"allowed: -1 (masked) or 0 to {num_experts - 1}"
        )
