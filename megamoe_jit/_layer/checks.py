"""Checks of what callers pass, before anything is launched: what it was, which value, what is allowed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from megamoe_jit._errors import ConfigError, UnsupportedDeviceError
from megamoe_jit._layer.given_weights import WeightTensors, require_tensors, written
from megamoe_jit._layer.marks import require_marked
from megamoe_jit._layer.quantize import require_tensor
from megamoe_jit._spec import KernelSpec, check_clamp
from megamoe_jit._spec.checks import check, check_float32
from megamoe_jit._text import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

RECIPE = (128, 128, 128)
SWIGLU = "swiglu"
_THREE = (int, int, int)
_IN_A_COPY = ", which a transform that is not in place gives"


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
    remedy: str = "",
) -> None:
    """Raise unless `tensor` has exactly this dtype, shape and device, is contiguous and aligned to `align` bytes.

    `remedy` is the next step where only the place in memory is wrong.
    """
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
    try:
        contiguous = tensor.is_contiguous()
    except (RuntimeError, TypeError, AttributeError):  # costs nothing where it is a dense tensor
        require_tensor(name, tensor)
        raise
    if not contiguous:
        raise ConfigError(f"{name} has strides {tensor.stride()}; allowed: contiguous, row-major{remedy}")
    if tensor.data_ptr() % align:
        at = f"{name} starts at {tensor.data_ptr():#x}"
        raise ConfigError(f"{at}; allowed: an address that is a multiple of {align}{remedy}")


def check_weights(l1: WeightTensors | None, l2: WeightTensors | None, spec: KernelSpec, device: torch.device) -> None:
    """Raise unless the tensors of both matrices fit the kernel, and are marked as transformed."""
    hidden, intermediate = spec.shape.hidden, spec.shape.intermediate
    l1, l2 = require_tensors("l1", l1), require_tensors("l2", l2)
    _check_parts("l1", l1, spec, (2 * intermediate, hidden), device)
    _check_parts("l2", l2, spec, (hidden, intermediate), device)
    for name, what, tensor in written(l1, l2, spec.weights):
        require_marked(name, tensor, weights=spec.weights, what=what)


def _check_parts(
    name: str, tensors: WeightTensors, spec: KernelSpec, size: tuple[int, int], device: torch.device
) -> None:
    """Raise unless these are a kernel's matrix of so many rows and columns, of each expert."""
    parts, stored = spec.weights.parts(*size), spec.weights
    if len(tensors) != len(parts):
        way = ", as the transform makes them of codes and exponents" if stored.group else ""
        raise ConfigError(f"{name}: {len(tensors)} tensors given; allowed: {', '.join(stored.part_names)}{way}")
    for part, tensor in zip(parts, tensors, strict=True):
        what = f"{name} weights" if part.name == "codes" else f"{name} {part.name}"
        align = 4 if part.name == "scales" else 16
        check_tensor(
            what, tensor, part.dtype, (spec.local_experts, *part.shape), device, align=align, remedy=_IN_A_COPY
        )


def check_recipe(recipe: Sequence[int], activation: str, clamp: float | None) -> float:
    """Raise unless the options are the supported ones; the clamp as the kernel takes it (infinity for none)."""
    if recipe is not RECIPE and not (
        isinstance(recipe, tuple | list) and tuple(map(type, recipe)) == _THREE and tuple(recipe) == RECIPE
    ):
        raise ConfigError(f"recipe = {shown(recipe)} is not supported; allowed: {RECIPE}")
    if activation is not SWIGLU:
        check_activation(activation)
    return check_clamp("activation_clamp", clamp)


def check_activation(activation: str) -> None:
    """Raise unless this is the one there are kernels for."""
    check(isinstance(activation, str) and activation == SWIGLU, "activation", activation, "'swiglu'")


def check_neutral(use_fp8_dispatch: bool | None, mma_type: str) -> None:
    """Raise unless what only DeepGEMM's buffers have is asked for in the form that means nothing."""
    neutral = use_fp8_dispatch is None or use_fp8_dispatch is True
    check(neutral, "use_fp8_dispatch", use_fp8_dispatch, "True or None, activations are sent in FP8")
    neutral = isinstance(mma_type, str) and mma_type.startswith("fp8x")
    check(neutral, "mma_type", mma_type, "'fp8x...', activations are multiplied in FP8")


def require_topology(topology: Any) -> Any:
    """The topology; raises `ConfigError` if it is none."""
    if not callable(getattr(topology, "lease", None)):
        raise ConfigError(f"topology: {type(topology).__name__} given; allowed: None, or a NodeTopology")
    return topology


def check_shared_weight(weight: float, shared: int) -> float:
    """The weight of so many shared experts as a float; raises unless it is a number, which matters."""
    weight = check_float32("shared_weight", weight)
    check(shared > 0 or weight == 1.0, "shared_weight", weight, "1.0, the layer has no shared experts")
    return weight


def check_bound(bound: int, tokens: int, capacity: int) -> None:
    """Raise unless a call of so many tokens can be one that has at most `bound`."""
    if type(bound) is not int or not tokens <= bound <= capacity:
        given = f"num_tokens_bound = {shown(bound)}"
        raise ConfigError(f"{given} is not supported; allowed: {tokens}, the tokens of y, to {capacity}, or None")


def check_expert_ids(topk_idx: torch.Tensor, num_experts: int) -> None:
    """Raise unless every id is -1 or an expert; synchronises, so only in debug mode."""
    bad = (topk_idx < -1) | (topk_idx >= num_experts)
    if bool(bad.any()):
        token, slot = (int(i) for i in bad.nonzero()[0])
        raise ConfigError(
            f"topk_idx[{token}, {slot}] = {int(topk_idx[token, slot])} is not an expert; "
            f"allowed: -1 (masked) or 0 to {num_experts - 1}"
        )
