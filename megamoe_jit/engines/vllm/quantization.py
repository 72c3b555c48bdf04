"""`--quantization megamoe_jit`: vLLM's own quantisations, with another method for routed experts.

vLLM asks each quantisation that a plug-in has added whether it takes a checkpoint; this one does where it was named.
Linear layers, attention, and whatever a checkpoint leaves unquantised are vLLM's.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit.engines.aside import warn_once
from megamoe_jit.engines.vllm.seams import MOE, QUANT

NAME = "megamoe_jit"  #: what is typed
_NAME_V4 = "megamoe_jit_deepseek_v4"  #: what it means for DeepSeek V4, whose checkpoints vLLM has a quantisation for
NAMES = (NAME, _NAME_V4)
_WHOLE = {NAME: (f"{QUANT}.fp8", "Fp8Config"), _NAME_V4: ("vllm.models.deepseek_v41", "DeepseekV4FP8Config")}  #: vLLM's
_V4 = ("deepseek_v4", "deepseek_v4_text", "deepseek_v41", "deepseek_v41_text")


def add() -> None:
    """Register the quantisation; a second time changes nothing."""
    package = importlib.import_module(QUANT)
    if NAME not in package.QUANTIZATION_METHODS:
        for name in NAMES:
            package.register_quantization_config(name)(_standing_for(name))


def _standing_for(name: str) -> Any:
    """A class that is registered in place of a whole one, which is imported when a model is built: with CUDA set up."""
    base: Any = importlib.import_module(f"{QUANT}.base_config").QuantizationConfig

    class MegaMoeConfig(base):  # type: ignore[misc]
        """What vLLM asks of a quantisation before there is a model."""

        def __init__(self) -> None:  # vLLM makes one for a checkpoint that says nothing of a quantisation
            raise ConfigError(_refused("that is not quantised"))

        @classmethod
        def get_name(cls) -> str:
            return name

        @classmethod
        def get_supported_act_dtypes(cls) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 90

        @classmethod
        def get_config_filenames(cls) -> list[str]:
            return []

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
        ) -> str | None:
            return _chosen(hf_quant_cfg, hf_config, user_quant) if name == NAME and user_quant in NAMES else None

        @classmethod
        def from_config(cls, config: Any) -> Any:
            return _config_class(*_WHOLE[name]).from_config(config)

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            raise NotImplementedError(f"{name} is made by from_config()")

    return MegaMoeConfig


@functools.cache
def _config_class(module: str, whole: str) -> Any:
    """One of vLLM's quantisations, with routed experts in this layer."""
    base: Any = getattr(importlib.import_module(module), whole)

    def get_quant_method(self: Any, layer: Any, prefix: str) -> Any:
        return _replaced(base.get_quant_method(self, layer, prefix), self, layer, prefix)

    return type(f"MegaMoe{whole}", (base,), {"get_quant_method": get_quant_method})


def __getattr__(name: str) -> Any:
    """These classes as pickle looks for them: vLLM sends its configuration to processes that it starts."""
    for module, whole in _WHOLE.values():
        if name == f"MegaMoe{whole}":
            return _config_class(module, whole)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _chosen(checkpoint: Any, hf_config: Any, user: str | None = NAME) -> str:
    """The quantisation for a checkpoint; raises `ConfigError` if there is none.

    A draft of DeepSeek V4's own has another model type, and the quantisation of its target.
    """
    found = checkpoint.get("quant_method"), checkpoint.get("weight_block_size")
    if found[0] in ("fp8", "deepseek_v4_fp8"):
        if user == _NAME_V4 or getattr(hf_config, "model_type", None) in _V4:
            return _NAME_V4
        if list(found[1] or ()) == [128, 128]:
            return NAME
    raise ConfigError(_refused(f"of quant_method {found[0]!r} and weight_block_size {found[1]}"))


def _refused(checkpoint: str) -> str:
    """Why a checkpoint has no quantisation of ours."""
    allowed = "'fp8' with [128, 128], or DeepSeek V4"
    return f"--quantization {NAME} with a checkpoint {checkpoint}; allowed: {allowed}. Next: without --quantization"


def _replaced(chosen: Any, config: Any, layer: Any, prefix: str) -> Any:
    """Our method in place of vLLM's for routed experts in FP8 or MXFP4; of anything else than experts as it is.

    Raises:
        ConfigError: experts of another format, or that are to be quantised once more.
    """
    from megamoe_jit.engines.vllm import method

    name = f"{type(chosen).__module__}.{type(chosen).__name__}"
    if name == f"{QUANT}.fp8.Fp8MoEMethod":
        ours = method.fp8_method_class()(config, layer)
    elif name == f"{QUANT}.mxfp4.Mxfp4MoEMethod":
        options = {key: getattr(chosen, key) for key in ("activation_key",) if hasattr(chosen, key)}
        ours = method.mxfp4_method_class()(layer.moe_config, layer, **options)
    else:
        _pass_by(chosen, name, prefix)
        return chosen
    online = getattr(getattr(config, "online_quantization_config", None), "args", None)
    if online is not None and (online.moe is not None or online.targets is not None):
        given = "--quantization-config with moe or targets"
        raise ConfigError(f"{given} beside --quantization {NAME}; allowed: linear, experts stay as they are on disk")
    return ours


def _pass_by(chosen: Any, name: str, prefix: str) -> None:
    """Leave a method to vLLM; that of experts only where the checkpoint has not quantised them, and not silently."""
    if not isinstance(chosen, importlib.import_module(f"{MOE}.fused_moe_method_base").FusedMoEMethodBase):
        return
    if name != f"{MOE}.unquantized_fused_moe_method.UnquantizedFusedMoEMethod":
        allowed = "FP8 with blocks of 128 x 128, or MXFP4"
        raise ConfigError(
            f"--quantization {NAME} with experts that vLLM runs by {type(chosen).__name__} ({prefix}); "
            f"allowed: {allowed}. Next: without --quantization"
        )
    warn_once("vllm: experts", f"megamoe-jit leaves experts that are not quantised to vLLM, as those of {prefix}")
