"""Methods of routed experts: vLLM's own load them; then weights in the kernel's order, and our experts."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import BLOCK
from megamoe_jit.engines.aside import LOG, no_shape
from megamoe_jit.engines.vllm import experts
from megamoe_jit.engines.vllm.seams import MOE, QUANT

_ORDERED = "_megamoe_jit_ordered"  #: of a parameter, once its layer is in the kernel's order
_AS_LEFT = ("sharded_state", "runai_streamer_sharded", "tensorizer")  #: formats of weights that a process has processed


class _AsThisLayer:
    """What a method has instead of vLLM's own: it loads as that one does, and runs as this layer."""

    supports_pre_processed_weights = False  # those of another process have no mark of their order

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        super().create_weights(layer, *sizes, **_careful(layer, more))  # type: ignore[misc]

    def process_weights_after_loading(self, layer: Any) -> None:
        _run_as_one_kernel(self, layer)


@functools.cache
def fp8_method_class() -> Any:
    """The class for FP8, a subclass of vLLM's, which is imported only here."""
    base: Any = importlib.import_module(f"{QUANT}.fp8").Fp8MoEMethod
    backends = importlib.import_module(f"{MOE}.oracle.fp8").Fp8MoeBackend

    class MegaMoeFp8MoEMethod(_AsThisLayer, base):  # type: ignore[misc]
        def __init__(self, quant_config: Any, layer: Any) -> None:
            super().__init__(quant_config, layer)
            self.fp8_backend = backends.TRITON  # for the scales as the checkpoint has them
            _choose(self, layer)

    return MegaMoeFp8MoEMethod


@functools.cache
def mxfp4_method_class() -> Any:
    """The class for MXFP4, likewise."""
    base: Any = importlib.import_module(f"{QUANT}.mxfp4").Mxfp4MoEMethod
    backends = importlib.import_module(f"{MOE}.oracle.mxfp4").Mxfp4MoeBackend

    class MegaMoeMxfp4MoEMethod(_AsThisLayer, base):  # type: ignore[misc]
        def __init__(self, moe: Any, layer: Any, **options: Any) -> None:
            super().__init__(moe, **options)
            self.mxfp4_backend = backends.EMULATION  # sizes and scales as the checkpoint has them
            _choose(self, layer)

    return MegaMoeMxfp4MoEMethod


def _careful(layer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options of parameters, their loader one that writes no plain weights over those in the kernel's order, unseen.

    It is a method of the layer as vLLM's is, which vLLM takes from a layer and gives to it when it loads once more.
    """
    loader = options.get("weight_loader")
    if getattr(loader, "__self__", None) is not layer:
        return options
    original = loader.__func__  # type: ignore[union-attr]

    @functools.wraps(original)
    def weight_loader(self: Any, param: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(param, _ORDERED, False):
            raise ConfigError(
                "weights of experts are loaded over those in the kernel's order; allowed: vLLM's own ways of loading "
                "once more, which process them. Next: reload_weights(), or its weight transfer"
            )
        return original(self, param, *args, **kwargs)

    return {**options, "weight_loader": MethodType(weight_loader, layer)}


def _choose(method: Any, layer: Any) -> None:
    """Have a method run our experts.

    Raises:
        ConfigError: there is no kernel for the layer; says each reason.
    """
    method.experts_cls = experts.experts_class()
    reasons = list(_refusals(method.moe, layer))
    if reasons:
        given = "; ".join(reasons)
        raise ConfigError(f"--quantization megamoe_jit cannot run this model: {given}. Next: without --quantization")


def _refusals(moe: Any, layer: Any) -> Iterator[str]:
    """Why there is no kernel for a layer, each with what there is one for."""
    if not experts.experts_class()._supports_current_device():
        yield "this GPU; allowed: Hopper (H100, H200, H20)"
    if moe.activation != importlib.import_module(f"{MOE}.activation").MoEActivation.SILU:
        yield f"activation {moe.activation}; allowed: silu"
    if moe.has_bias:
        yield "biases; allowed: none"
    if moe.is_lora_enabled:
        yield "--enable-lora, by which vLLM adds LoRA to experts as well; allowed: none"
    if moe.swiglu_alpha is not None or moe.swiglu_beta is not None:
        yield "alpha or beta of SwiGLU; allowed: swiglu_limit"
    if layer.apply_router_weight_on_input:
        yield "router weights on the input; allowed: on the output"
    if shape := _no_shape(moe):
        yield shape
    yield from _between_ranks(moe, layer)
    yield from _of_the_server()


def _between_ranks(moe: Any, layer: Any) -> Iterator[str]:
    """The same of how experts are spread over ranks."""
    parallel = moe.moe_parallel_config
    across = experts.is_across_ranks(parallel)
    if across and moe.skip_final_all_reduce:
        yield "skip_final_all_reduce; allowed: results summed over ranks"
    if across and moe.num_experts % parallel.ep_size:
        yield f"{moe.num_experts} experts; allowed: as many on each rank"
    if across and layer.expert_placement_strategy != "linear":
        given = f"--expert-placement-strategy {layer.expert_placement_strategy}"
        yield f"{given}; allowed: linear, which is vLLM's default"
    if parallel.use_batched_activation_format:
        yield f"--all2all-backend {parallel.all2all_backend}; allowed: allgather_reducescatter, which is not used"
    if getattr(parallel, "use_passthrough_all2all", False):
        yield f"--moe-backend {moe.moe_backend}, for which vLLM sums up nothing; allowed: no --moe-backend"


def _of_the_server() -> Iterator[str]:
    """The same of what the command line says, where there is one."""
    settings = importlib.import_module("vllm.config").get_current_vllm_config_or_none()
    parallel = getattr(settings, "parallel_config", None)
    load_format = getattr(getattr(settings, "load_config", None), "load_format", None)
    if getattr(parallel, "use_ubatching", False):
        yield "dual-batch overlap; allowed: no --enable-dbo or --ubatch-size"
    if getattr(parallel, "enable_elastic_ep", False):
        yield "--enable-elastic-ep; allowed: as many ranks as at the start"
    if load_format in _AS_LEFT:
        yield f"--load-format {load_format}, whose weights do not tell the order they are in; allowed: checkpoints"


def _no_shape(moe: Any) -> str:
    """Why there is no kernel of a layer's sizes, those of a rank; empty if there is one."""
    hidden = -(-moe.hidden_dim // BLOCK) * BLOCK  # vLLM pads it later for some backends
    count = moe.num_experts if experts.is_across_ranks(moe.moe_parallel_config) else moe.num_local_experts
    return no_shape(hidden, moe.intermediate_size_per_partition, count, moe.experts_per_token)


def _run_as_one_kernel(method: Any, layer: Any) -> None:
    """Have our experts take a layer over, and build the kernel that runs them."""
    method.moe_quant_config = method.get_fused_moe_quant_config(layer)
    ours = method.experts_cls(moe_config=method.moe, quant_config=method.moe_quant_config)
    ours.process_weights_after_loading(layer)
    for parameter in layer.parameters():
        setattr(parameter, _ORDERED, True)
    kernel = importlib.import_module(f"{MOE}.modular_kernel").FusedMoEKernel
    method.moe_kernel = kernel(experts.prepare_finalize(method.moe, method.moe_quant_config, ours), ours)
    LOG.debug("%s runs as one kernel", getattr(layer, "layer_name", "a layer"))
