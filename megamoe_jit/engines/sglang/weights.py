"""Experts of SGLang's layers: taken over in place once they are loaded, given back before others are loaded over them.

SGLang restores a layer before it updates weights, but not before every way of doing so, and a checkpoint may have some
experts only. So whatever is about to be written into a layer that was taken over finds all of it in SGLang's order, and
the step that follows a load takes it over again. Addresses stay, as captured graphs need it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.given_weights import PACKED_TYPES, e8m0_of
from megamoe_jit.engines.aside import warn_once
from megamoe_jit.engines.held import HeldExperts
from megamoe_jit.engines.sglang.hooks import PROBE, around

_HELD = "_megamoe_jit_held"  #: of a layer
RUN = "_megamoe_jit_run"  #: of a layer, where SGLang's usual call of its experts is ours: of the method and a batch
_CODES, _SCALES = ("w13_weight", "w2_weight"), ("w13_weight_scale_inv", "w2_weight_scale_inv")
_AS_LEFT = ("sharded_state", "remote", "remote_instance")  #: formats of weights that are written over processed ones
FP8_METHOD = "sglang.srt.layers.quantization.fp8.Fp8MoEMethod"
FUSED_MOE = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE"


def held_by(layer: Any) -> HeldExperts | None:
    """The experts of a layer that was taken over."""
    return getattr(layer, _HELD, None)


def on_hopper() -> bool:
    """Whether SGLang runs on the GPUs that this plug-in is for; it is loaded on others too."""
    return getattr(importlib.import_module("sglang.srt.layers.moe.mega_moe_sm90"), "_device_sm", None) == 90


def shared_among_packed(method: Any, layer: Any) -> str:
    """Why a layer cannot be loaded, where shared experts are among its routed ones in MXFP4; else nothing."""
    if not method.is_fp4_expert or not getattr(layer, "num_fused_shared_experts", 0):
        return ""
    return (
        "shared experts, which are in FP8, among routed ones in MXFP4; allowed: beside them, where SGLang runs them "
        "itself. Next: without --enforce-shared-experts-fusion"
    )


def other_sums(config: Any) -> Iterator[str]:
    """What a layer's configuration asks experts to compute that this kernel does not, each with what it does."""
    if config.activation != "silu" or not config.is_gated:
        yield f"activation {config.activation}; allowed: gated silu"
    if config.apply_router_weight_on_input:
        yield "router weights on the input; allowed: on the output"
    if any(each is not None for each in (config.gemm1_alpha, config.gemm1_beta, config.gemm1_clamp_limit)):
        yield "alpha, beta or a limit of gemm1; allowed: swiglu_limit"


def left_by_another() -> Iterator[str]:
    """Why weights that SGLang reads cannot be taken over: as another process left them, in an order of its own."""
    named = getattr(importlib.import_module("sglang.srt.runtime_context").get_model(), "load_format", None)
    for name in _AS_LEFT:  # in its own words: what is named may be a member of an enumeration, which equals one
        if name == named:
            yield f"--load-format {name}; allowed: checkpoints, whose weights are in an order that is known"


def take(layer: Any) -> HeldExperts:
    """Take over the experts of a `FusedMoE`, in place; again after a load.

    MXFP4 comes with float32 scales of groups, which are loaded again into such: what the kernel reads is in their place
    while a layer is taken over, as a parameter, since SGLang moves experts as slices of those.

    Raises:
        ConfigError: there is no kernel for them; the layer is as it was.
    """
    missing = [name for name in _CODES + _SCALES if not hasattr(layer, name)]
    if missing:
        raise ConfigError(f"the layer has no {', '.join(missing)}; allowed: experts in FP8 or MXFP4")
    codes, scales = ([getattr(layer, name).data for name in names] for names in (_CODES, _SCALES))
    held = held_by(layer)
    packed = codes[0].dtype in PACKED_TYPES
    if packed and scales[0].dtype is not torch.uint8:
        codes, scales = [each.view(torch.uint8) for each in codes], [e8m0_of(each) for each in scales]
        if held is not None and held.keeps(codes[0], held.l1[1], codes[1], held.l2[1]):
            for mine, loaded in zip((held.l1[1], held.l2[1]), scales, strict=True):
                mine.copy_(loaded)
            scales = [held.l1[1], held.l2[1]]
    if held is None or not held.keeps(codes[0], scales[0], codes[1], scales[1]):
        held = HeldExperts((codes[0], scales[0]), (codes[1], scales[1]))
    held.to_kernel()
    setattr(layer, _HELD, held)
    if packed:
        _hold_groups(layer, held)
    return held


def _hold_groups(layer: Any, held: HeldExperts) -> None:
    """Have a layer's parameters be what the kernel reads of MXFP4 besides codes."""
    for name, given in zip(_SCALES, (held.l1, held.l2), strict=True):
        getattr(layer, name).data = given[1]
        blocks = f"megamoe_jit_{name}_blocks"
        if getattr(layer, blocks, None) is None:
            layer.register_parameter(blocks, torch.nn.Parameter(given[2], requires_grad=False))
        getattr(layer, blocks).data = given[2]


def give_back(layer: Any) -> None:
    """Have a layer that was taken over be as SGLang loads it; any other is left alone."""
    held = held_by(layer)
    if held is None:
        return
    held.to_plain()  # costs a look at a flag where it is so
    for name, given in zip(_SCALES, (held.l1, held.l2), strict=True):
        scales = getattr(layer, name)
        if held.weights.group and scales.dtype is torch.uint8:
            scales.data = given[1].view(torch.float8_e8m0fnu).to(torch.float32)


def try_to_take(layer: Any) -> HeldExperts | None:
    """`take`, or one warning and None."""
    reasons = [*other_sums(layer.moe_runner_config), *left_by_another()]
    if not reasons:
        try:
            return take(layer)
        except ConfigError as error:
            reasons = [str(error)]
    warn_once("sglang: experts", f"megamoe-jit leaves experts of this model to SGLang: {'; '.join(reasons)}")
    return None


def hook() -> None:
    """Have layers that were taken over given back before something is written into them, and read by us alone."""
    around(f"{FP8_METHOD}.restore_weights_before_loading", _restore)
    around(f"{FP8_METHOD}.apply", _apply)
    around(f"{FUSED_MOE}.weight_loader", _load)
    around(f"{FUSED_MOE}.weight_loader_fused", _load)


def _restore(original: Callable[..., Any], method: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    if layer is PROBE:
        return PROBE
    give_back(layer)
    return original(method, layer, *args, **kwargs)


def _apply(original: Callable[..., Any], method: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang's usual call of a layer's experts, by a kernel that reads them in SGLang's order."""
    if layer is PROBE:
        return PROBE
    run = getattr(layer, RUN, None)
    if run is not None:
        return run(method, *args, **kwargs)
    if held_by(layer) is not None:
        raise ConfigError(
            "SGLang passed --moe-a2a-backend megamoe by, as it does for more tokens of a rank than "
            "SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK, and its other kernels cannot read these weights; "
            "allowed: at most so many. Next: a larger value of it, or a smaller --chunked-prefill-size"
        )
    return original(method, layer, *args, **kwargs)


def _load(original: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    if layer is PROBE:
        return PROBE
    give_back(layer)
    return original(layer, *args, **kwargs)
