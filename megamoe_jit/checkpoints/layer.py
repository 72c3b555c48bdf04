"""`layer_from_checkpoint`: a layer of a model's checkpoint as a `MegaMoE`, by what its files and `config.json` say."""

from __future__ import annotations

import os
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.moe import MegaMoE
from megamoe_jit._layer.weights import is_transformed
from megamoe_jit._spec import MAX_TOKENS, MAX_TOPK, check_clamp, check_flag, check_int
from megamoe_jit._spec.checks import check
from megamoe_jit.checkpoints.config import clamp_of, topk_of
from megamoe_jit.checkpoints.files import Files
from megamoe_jit.checkpoints.load import Progress, load_experts, load_shared_experts

__all__ = ["layer_from_checkpoint"]


def layer_from_checkpoint(
    path: str | os.PathLike[str],
    layer: int,
    *,
    max_tokens: int,
    device: torch.device | str = "cuda",
    topk: int | None = None,
    clamp: float | str | None = "auto",
    shared_experts: bool = False,
    weight_format: str = "auto",
    scheme: str | None = None,
    lossy: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> MegaMoE:
    """A `MegaMoE` with the experts of one layer of a model; what `MegaMoE.from_checkpoint` calls.

    Args:
        path, layer, weight_format, scheme, lossy, progress: as `load_experts`.
        max_tokens: as `MegaMoE`.
        device: a CUDA device.
        topk: experts of a token; by default as `config.json` says.
        clamp: bound of SwiGLU; by default ("auto") as `config.json` says.
        shared_experts: the model's shared expert is part of the layer.
        options: others of `MegaMoE`.

    Returns:
        The layer.

    Raises:
        ConfigError: as `load_experts` and `MegaMoE`; or nothing says how many experts a token has.
        MegaMoeError: as `load_experts` and `MegaMoE`.
    """
    config = Files(path).config
    slots = topk_of(config) if topk is None else topk
    if slots is None:
        raise ConfigError("topk: config.json does not say how many experts a token has; allowed: name it")
    bound: Any = clamp_of(config) if isinstance(clamp, str) and clamp == "auto" else clamp
    _check_options(slots, max_tokens, bound, shared_experts)
    how: dict[str, Any] = {"device": device, "weight_format": weight_format, "scheme": scheme, "lossy": lossy}
    w13, w2 = load_experts(path, layer, **how, progress=progress)
    shared = load_shared_experts(path, layer, **how) if shared_experts else None
    if shared is not None:
        _check_fit((w13, w2), shared, layer)
        options |= {"shared_w13": shared[0], "shared_w2": shared[1]}
    keep = shared is None and not isinstance(w13, torch.Tensor)
    return MegaMoE(w13, w2, topk=slots, max_tokens=max_tokens, clamp=bound, inplace=keep, **options)


def _check_options(topk: int, max_tokens: int, clamp: float | None, shared_experts: bool) -> None:
    """Raise for what no layer takes, before gigabytes are read for one."""
    for name, number, most in (("topk", topk, MAX_TOPK), ("max_tokens", max_tokens, MAX_TOKENS)):
        check_int(name, number)
        check(1 <= number <= most, name, number, f"1 to {most}")
    check_clamp("clamp", clamp)
    check_flag("shared_experts", shared_experts)


def _check_fit(routed: tuple[Any, Any], shared: Any, layer: int) -> None:
    """Raise where routed and shared experts are not in one format, as DeepSeek-V4's are not in its files, or order."""
    (w13, w2), codes = routed, shared[0][0]
    beside = "shared_experts=False and that one beside the layer"
    if not isinstance(w13, torch.Tensor) and is_transformed(w13, w2):
        given = f"routed experts of layer {layer} are in the kernel's order by themselves"
        raise ConfigError(f"{given}; allowed: {beside}, or the checkpoint that this one was made of")
    if w13[0].dtype is not codes.dtype:
        given = f"routed experts of layer {layer} are {w13[0].dtype}, its shared one {codes.dtype}"
        allowed = f"weight_format='fp8', which keeps all values, or {beside}"
        raise ConfigError(f"{given}, and a layer has one format; allowed: {allowed}")
