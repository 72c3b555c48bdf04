"""The method of routed experts: vLLM's for FP8 loads them; then weights in the kernel's order, and our experts."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit.engines.aside import LOG
from megamoe_jit.engines.held import HeldExperts
from megamoe_jit.engines.vllm import experts

__all__ = ["method_class"]

_MOE = "vllm.model_executor.layers.fused_moe"


@functools.cache
def method_class() -> Any:
    """The class, a subclass of vLLM's, which is imported only here."""
    base: Any = importlib.import_module("vllm.model_executor.layers.quantization.fp8").Fp8MoEMethod
    backends = importlib.import_module(f"{_MOE}.oracle.fp8").Fp8MoeBackend

    class MegaMoeFp8MoEMethod(base):  # type: ignore[misc]
        """Loads as vLLM's FP8 method, runs as this layer."""

        supports_pre_processed_weights = False  # those of another process have no mark of their order

        def __init__(self, quant_config: Any, layer: Any) -> None:
            super().__init__(quant_config, layer)
            self.experts_cls = experts.experts_class()
            self.fp8_backend = backends.TRITON  # for the scales as the checkpoint has them
            reasons = _refusals(self.moe, layer)
            if reasons:
                raise ConfigError(
                    f"--quantization megamoe_jit cannot run this model: {'; '.join(reasons)}. "
                    "Next: without --quantization"
                )

        def process_weights_after_loading(self, layer: Any) -> None:
            names = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")
            HeldExperts(*(getattr(layer, name).data for name in names)).to_kernel()
            self._init_moe_kernel(layer)

        def _init_moe_kernel(self, layer: Any) -> None:
            self.moe_quant_config = self.get_fused_moe_quant_config(layer)
            ours = self.experts_cls(moe_config=self.moe, quant_config=self.moe_quant_config)
            ours.bind(layer)
            kernel = importlib.import_module(f"{_MOE}.modular_kernel").FusedMoEKernel
            self.moe_kernel = kernel(experts.prepare_finalize(self.moe, self.moe_quant_config), ours)
            LOG.debug("%s runs as one kernel", getattr(layer, "layer_name", "a layer"))

    return MegaMoeFp8MoEMethod


def _refusals(moe: Any, layer: Any) -> list[str]:
    """Why there is no kernel for a layer, each with what there is one for."""
    silu = importlib.import_module(f"{_MOE}.activation").MoEActivation.SILU
    parallel = moe.moe_parallel_config
    across = experts.is_across_ranks(parallel)
    checks = (
        (not experts.experts_class()._supports_current_device(), "this GPU; allowed: Hopper (H100, H200, H20)"),
        (moe.activation != silu, f"activation {moe.activation}; allowed: silu"),
        (moe.has_bias, "biases; allowed: none"),
        (moe.is_lora_enabled, "LoRA on experts; allowed: none"),
        (moe.swiglu_alpha is not None or moe.swiglu_beta is not None, "alpha or beta of SwiGLU; allowed: swiglu_limit"),
        (bool(layer.apply_router_weight_on_input), "router weights on the input; allowed: on the output"),
        (across and moe.skip_final_all_reduce, "skip_final_all_reduce; allowed: results summed over ranks"),
        (
            across and moe.num_experts % parallel.ep_size != 0,
            f"{moe.num_experts} experts; allowed: as many on each rank",
        ),
        (
            parallel.use_batched_activation_format,
            f"--all2all-backend {parallel.all2all_backend}; allowed: allgather_reducescatter, which is not used",
        ),
    )
    return [reason for found, reason in checks if found]
