"""Experts of SGLang's layers: taken over in place once they are loaded, given back before others are loaded over them.

SGLang restores a layer before it updates weights, but not before every way of doing so, and a checkpoint may have some
experts only. So whatever is about to be written into a layer that was taken over finds all of it in SGLang's order, and
the step that follows a load takes it over again. Addresses stay, as captured graphs need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit.engines.aside import warn_once
from megamoe_jit.engines.held import HeldExperts
from megamoe_jit.engines.sglang.hooks import PROBE, around

__all__ = ["held_by", "hook", "take", "try_to_take"]

_HELD = "_megamoe_jit_held"  #: of a layer
_FP8 = "sglang.srt.layers.quantization.fp8.Fp8MoEMethod"
_LAYER = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE"


def held_by(layer: Any) -> HeldExperts | None:
    """The experts of a layer that was taken over."""
    return getattr(layer, _HELD, None)


def take(layer: Any) -> HeldExperts:
    """Take over the experts of a `FusedMoE` with FP8 blocks, in place; again after a load.

    Raises:
        ConfigError: there is no kernel for them; the layer is as it was.
    """
    names = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")
    missing = [name for name in names if not hasattr(layer, name)]
    if missing:
        raise ConfigError(f"the layer has no {', '.join(missing)}; allowed: experts in FP8 with scales of 128 x 128")
    tensors = [getattr(layer, name).data for name in names]
    held = held_by(layer)
    if held is None or not held.keeps(*tensors):
        held = HeldExperts(*tensors)
        setattr(layer, _HELD, held)
    held.to_kernel()
    return held


def try_to_take(layer: Any) -> HeldExperts | None:
    """`take`, or one warning and None."""
    try:
        return take(layer)
    except ConfigError as error:
        warn_once("sglang: experts", f"megamoe-jit leaves experts of this model to SGLang: {error}")
        return None


def hook() -> None:
    """Have layers that were taken over given back before something is written into them."""
    around(f"{_FP8}.restore_weights_before_loading", _restore)
    around(f"{_LAYER}.weight_loader", _load)
    around(f"{_LAYER}.weight_loader_fused", _load)


def _restore(original: Callable[..., Any], method: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    if layer is PROBE:
        return PROBE
    held = held_by(layer)
    if held is not None:
        held.to_plain()
    return original(method, layer, *args, **kwargs)


def _load(original: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    if layer is PROBE:
        return PROBE
    held = held_by(layer)
    if held is not None:
        held.to_plain()  # costs a look at a mark where it is
    return original(layer, *args, **kwargs)
