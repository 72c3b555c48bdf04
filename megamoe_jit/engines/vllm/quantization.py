"""`--quantization megamoe_jit`: vLLM's FP8, with another method for routed experts.

vLLM asks each quantisation that a plug-in has added whether it takes a checkpoint; this one does where it was named.
Whatever it is not asked for, or that no kernel is there for, is vLLM's own FP8.
"""

from __future__ import annotations

import importlib
from typing import Any

from megamoe_jit._errors import ConfigError

__all__ = ["NAME", "NAMES", "add"]

NAME = "megamoe_jit"
NAMES = (NAME,)
_QUANT = "vllm.model_executor.layers.quantization"


def add() -> None:
    """Register the quantisation; a second time changes nothing."""
    package = importlib.import_module(_QUANT)
    if NAME not in package.QUANTIZATION_METHODS:
        package.register_quantization_config(NAME)(_config_class())


def _config_class() -> Any:
    base: Any = importlib.import_module(f"{_QUANT}.fp8").Fp8Config
    routed = importlib.import_module("vllm.model_executor.layers.fused_moe").RoutedExperts

    class MegaMoeFp8Config(base):  # type: ignore[misc]
        """FP8 checkpoints with blocks of 128 x 128, their routed experts in this layer."""

        @classmethod
        def get_name(cls) -> str:
            return NAME

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
        ) -> str | None:
            if user_quant != NAME:
                return None
            found = hf_quant_cfg.get("quant_method"), hf_quant_cfg.get("weight_block_size")
            if found[0] != "fp8" or list(found[1] or ()) != [128, 128]:
                raise ConfigError(
                    f"--quantization {NAME} with a checkpoint of quant_method {found[0]!r} and weight_block_size "
                    f"{found[1]}; allowed: 'fp8' with [128, 128]. Next: without --quantization"
                )
            return NAME

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            chosen = super().get_quant_method(layer, prefix)
            fp8 = importlib.import_module(f"{_QUANT}.fp8")
            if isinstance(layer, routed) and type(chosen) is fp8.Fp8MoEMethod:
                from megamoe_jit.engines.vllm.method import method_class

                return method_class()(self, layer)
            return chosen

    return MegaMoeFp8Config
