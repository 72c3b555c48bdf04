"""`--moe-a2a-backend megamoe` on SM90: SGLang's own path, with this kernel in place of DeepGEMM's.

Four functions of it are ours for layers that were taken over, and the original for others. A layer is taken over only
where all four are, since DeepGEMM reads another order of weights.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer import from_bf16
from megamoe_jit._spec import WeightFormat
from megamoe_jit.engines.across import buffer_across
from megamoe_jit.engines.aside import warn_once
from megamoe_jit.engines.sglang import weights
from megamoe_jit.engines.sglang.hooks import PROBE, around, reaches

_SM90 = "sglang.srt.layers.moe.mega_moe_sm90"
_MEGA = "sglang.srt.layers.moe.mega_moe"

_formats: dict[tuple[int, int], tuple[WeightFormat, ...]] = {}  #: of layers that were taken over, by their sizes


def hook() -> None:
    """Register the hooks; SGLang applies them."""
    weights.hook()
    around(f"{_SM90}.build_sm90_mega_moe_experts_weights", _build)
    around(f"{_MEGA}.build_mega_moe_experts_weights", _build_packed)
    around(f"{_SM90}.is_sm90_fp8_mega_moe_available", _is_available)
    around(f"{_SM90}.run_sm90_mega_routed", _run)
    around(f"{_MEGA}._get_mega_moe_symm_buffer", _buffer)
    around("sglang.srt.arg_groups.mega_moe_hook.mega_moe_needs_token_budget", _needs_budget)


@functools.cache
def _all_in_place() -> bool:
    """Whether calls of all hooked functions arrive, by the names that SGLang calls them by."""
    before = {  # the argument that a hook looks at
        f"{_SM90}.build_sm90_mega_moe_experts_weights": 0,
        f"{_MEGA}.build_mega_moe_experts_weights": 0,
        f"{_MEGA}.is_sm90_fp8_mega_moe_available": 0,
        f"{_MEGA}.run_sm90_mega_routed": 0,
        f"{_MEGA}._get_mega_moe_symm_buffer": 0,
        f"{weights.FP8_METHOD}.restore_weights_before_loading": 1,
        f"{weights.FP8_METHOD}.apply": 1,
        f"{weights.FUSED_MOE}.weight_loader": 0,
        f"{weights.FUSED_MOE}.weight_loader_fused": 0,
    }
    missing = [name for name, arguments in before.items() if not reaches(name, arguments)]
    if missing:
        warn_once(
            "sglang: plug-in", f"megamoe-jit leaves SGLang as it is: its hooks did not reach {', '.join(missing)}"
        )
    return not missing


def _build(original: Callable[..., None], experts: Any) -> Any:
    """Bring a layer's experts into the kernel's order, in place, once they are loaded."""
    if experts is PROBE:
        return PROBE
    held = weights.try_to_take(experts) if _all_in_place() else None
    if held is None:
        return original(experts)
    sizes = held.hidden, held.intermediate
    known = _formats.get(sizes, ())
    _formats[sizes] = known if held.weights in known else (*known, held.weights)
    experts.mega_l1_weights, experts.mega_l2_weights = held.l1, held.l2
    experts._mega_moe_sm90_fp8_weights = experts._mega_moe_weights_built = True
    return None


def _build_packed(original: Callable[..., None], experts: Any) -> Any:
    """The same of MXFP4 experts, for which SGLang has a kernel on other GPUs alone."""
    if experts is PROBE:
        return PROBE
    return _build(original, experts) if weights.on_hopper() else original(experts)


def _is_available(original: Callable[..., bool], experts: Any) -> Any:
    if experts is PROBE:
        return PROBE
    return weights.held_by(experts) is not None or original(experts)


def _needs_budget(
    original: Callable[..., bool], model_arch: str, hf_quant_config: Any, quantization: str | None
) -> bool:
    """Whether SGLang is to see as it starts that all batches fit: those beyond would go to kernels of another order."""
    if original(model_arch, hf_quant_config, quantization):
        return True
    named = str((hf_quant_config or {}).get("quant_method", ""))
    platform = importlib.import_module("sglang.srt.runtime_context").get_platform()
    return "fp8" in named and bool(platform.is_sm90)


def _buffer(
    original: Callable[..., Any],
    group: Any,
    num_experts: int = 0,
    num_max_tokens_per_rank: int = 0,
    num_topk: int = 0,
    hidden: int = 0,
    intermediate_hidden: int = 0,
    num_shared_experts: int = 0,
    **options: Any,
) -> Any:
    """The buffer of all layers of these sizes; a collective of the group the first time, with all its kernels."""
    if group is PROBE:
        return PROBE
    sizes = (num_experts, num_max_tokens_per_rank, num_topk, hidden, intermediate_hidden, num_shared_experts)
    stored = _formats.get((hidden, intermediate_hidden))
    if stored is None:
        return original(group, *sizes, **options)
    if num_shared_experts:
        raise ConfigError(
            f"num_shared_experts = {num_shared_experts} with SGLang's megamoe backend; allowed: 0, shared experts run "
            "beside the kernel or as routed ones. Next: without SGLANG_OPT_DEEPGEMM_MEGA_MOE_FUSE_SHARED_EXPERTS"
        )
    activation = options.get("activation", "swiglu")  # `mma_type` says nothing: weights tell their own format
    return buffer_across(group, *sizes[:-1], activation=activation, weights=stored)


def _run(
    original: Callable[..., torch.Tensor],
    experts: Any,
    hidden_states: Any = None,
    topk_ids: Any = None,
    topk_weights: Any = None,
    buf: Any = None,
    num_tokens: int = 0,
    *,
    hidden_size: int = 0,
    activation_clamp: float | None = None,
    routed_scaling_factor: float = 1.0,
) -> Any:
    """The routed experts of a batch: bf16 ``[num_tokens, hidden]``, summed over the ranks' experts."""
    if experts is PROBE:
        return PROBE
    if weights.held_by(experts) is None:
        options: dict[str, Any] = {"activation_clamp": activation_clamp, "routed_scaling_factor": routed_scaling_factor}
        batch = (hidden_states, topk_ids, topk_weights, buf, num_tokens)
        return original(experts, *batch, hidden_size=hidden_size, **options)
    return from_bf16.mega_moe_from_bf16(
        hidden_states[:num_tokens],
        topk_ids[:num_tokens],
        topk_weights[:num_tokens],
        experts.mega_l1_weights,
        experts.mega_l2_weights,
        buf,
        routed_scaling_factor=routed_scaling_factor,
        activation_clamp=activation_clamp,
    )
