"""vLLM's own MoE sources on any machine: the modules that the plug-in meets are real, the rest stands in."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.engines.sources import RealSources

__all__ = ["VllmWorld", "vllm_world"]

_LAYERS = "vllm.model_executor.layers"
_MOE = f"{_LAYERS}.fused_moe"
REAL = (
    "vllm.distributed.eplb.eplb_utils",
    "vllm.model_executor.custom_op",
    "vllm.model_executor.utils",
    *(
        f"vllm.model_executor.model_loader.reload.{name}"
        for name in ("layerwise", "meta", "sanitize", "types", "utils")
    ),
    "vllm.models.deepseek_v4.quant_config",
    "vllm.models.deepseek_v41.quant_config",
    "vllm.plugins",
    "vllm.utils.math_utils",
    *(
        f"{_MOE}.{name}"
        for name in ("activation", "all2all_utils", "config", "expert_map_manager", "fused_moe_method_base")
        + ("modular_kernel", "moe_output", "oracle.fp8", "oracle.mxfp4", "prepare_finalize.naive_dp_ep")
        + ("prepare_finalize.no_dp_ep", "routed_experts", "runner.shared_experts", "topk_weight_and_reduce")
        + ("unquantized_fused_moe_method", "utils")
    ),
    f"{_LAYERS}.quantization",
    f"{_LAYERS}.quantization.base_config",
    f"{_LAYERS}.quantization.fp8",
    f"{_LAYERS}.quantization.mxfp4",
    f"{_LAYERS}.quantization.utils.ocp_mx_utils",
    f"{_LAYERS}.quantization.utils.quant_utils",
)
STAND_INS = ("triton", "deep_gemm", "flashinfer", "compressed_tensors", "aiter", "msgspec")
ENTRY = EntryPoint("megamoe_jit", "megamoe_jit.engines.vllm:register", "vllm.general_plugins")


class VllmWorld:
    """One rank of a vLLM whose parallelism and group are what a test says."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.group: Any = SimpleNamespace(size=lambda: 1)
        communicator = SimpleNamespace(all2all_manager=SimpleNamespace(world_size=2))
        self.ep_group = SimpleNamespace(device_group=self.group, device_communicator=communicator)
        model = SimpleNamespace(quantization=None, dtype=torch.bfloat16)
        self.parallel = SimpleNamespace(use_ubatching=False, enable_elastic_ep=False)  #: of the command line
        self.loading = SimpleNamespace(load_format="auto")
        self.config = SimpleNamespace(
            model_config=model, lora_config=None, parallel_config=self.parallel, load_config=self.loading
        )

    def module(self, name: str) -> Any:
        return importlib.import_module(f"vllm.{name}")

    def stand_in(self) -> None:
        """What the real modules ask of others when they are imported, and later."""
        cpu = self.device == "cpu"
        no = ("is_rocm", "is_xpu", "is_fp8_fnuz", "is_cpu", "use_sync_weight_loader")
        platform = SimpleNamespace(
            **{name: lambda: False for name in no}, is_cuda=lambda: True, is_cuda_alike=lambda: True,
            is_device_capability=lambda capability: capability == 90, is_device_capability_family=lambda _: False,
            fp8_dtype=lambda: torch.float8_e4m3fn, supported_quantization=None, device_name="stand-in",
            simple_compile_backend="eager",
        )  # fmt: skip
        platform.is_cpu = lambda: cpu  # then no workspace manager is asked
        self.module("platforms").current_platform = platform
        self.module("envs").VLLM_BATCH_INVARIANT = False
        self.module("v1.worker.ubatching").dbo_enabled = lambda: False
        manager = SimpleNamespace(get_simultaneous=self._allocated)
        self.module("v1.worker.workspace").current_workspace_manager = lambda: manager
        self.module("config").get_current_vllm_config_or_none = lambda: self.config
        self.module("config").get_current_vllm_config = lambda: self.config
        for name in ("distributed", "distributed.parallel_state"):
            self.module(name).get_ep_group = self._ep_group
        self.module("model_executor.models.utils")
        for name in ("has_deep_ep", "has_deep_ep_v2", "has_mori", "has_nixl_ep", "has_moonep"):
            setattr(self.module("utils.import_utils"), name, lambda: False)

    def _ep_group(self) -> Any:
        self.ep_group.device_group = self.group
        return self.ep_group

    def _allocated(self, *wanted: Any) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in wanted]

    def start(self) -> None:
        """Load plug-ins as each process of vLLM does."""
        plugins = self.module("plugins")
        plugins.envs = SimpleNamespace(VLLM_PLUGINS=None)
        patched = importlib.import_module("importlib.metadata")
        original = patched.entry_points
        patched.entry_points = lambda **given: [ENTRY] if given.get("group") == ENTRY.group else []
        try:
            plugins.load_general_plugins()
        finally:
            patched.entry_points = original

    def chosen(self, user: str | None, checkpoint: dict[str, Any], model_type: str | None = None) -> Any:
        """The quantisation of a checkpoint, as `ModelConfig` finds it; an object, or None for vLLM's own choice."""
        package = self.module("model_executor.layers.quantization")
        hf_config = SimpleNamespace(model_type=model_type, expert_dtype="fp4", quantization_config=checkpoint)
        self.config.model_config.hf_config = hf_config
        for config in package._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.values():
            name = config.override_quantization_method(checkpoint, user, hf_config=hf_config)
            if name is not None:
                self.config.model_config.quantization = name
                return package._CUSTOMIZED_METHOD_TO_QUANT_CONFIG[name].from_config(checkpoint)
        return None

    def moe_config(
        self, shape: Any, *, ranks: int = 1, rank: int = 0, dp: int = 1, ep: bool = False, **more: Any
    ) -> Any:
        """A `FusedMoEConfig`; the sizes of `shape` are those of one rank."""
        config = self.module("model_executor.layers.fused_moe.config")
        tp = 1 if ep else ranks
        parallel = config.FusedMoEParallelConfig(
            tp_size=tp, pcp_size=1, dp_size=dp, ep_size=ranks if ep else 1, tp_rank=0 if ep else rank, pcp_rank=0,
            dp_rank=rank if dp > 1 else 0, ep_rank=rank if ep else 0, sp_size=1, use_ep=ep,
            all2all_backend=more.pop("all2all", "allgather_reducescatter"), enable_eplb=more.pop("eplb", False),
        )  # fmt: skip
        experts = shape.experts * (ranks if ep else 1)
        silu = self.module("model_executor.layers.fused_moe.activation").MoEActivation.SILU
        return config.FusedMoEConfig(
            num_experts=experts, num_logical_experts=experts, num_local_experts=shape.experts,
            experts_per_token=shape.topk, hidden_dim=shape.hidden, intermediate_size=shape.intermediate * tp,
            activation=more.pop("activation", silu), device=self.device, routing_method=None,
            moe_parallel_config=parallel, in_dtype=torch.bfloat16, max_num_tokens=more.pop("tokens", 512), **more,
        )  # fmt: skip

    def layer(self, quantization: Any, moe: Any, **options: Any) -> Any:
        """A real `RoutedExperts` of a quantisation, its weights not yet loaded."""
        parallel = moe.moe_parallel_config
        experts = moe.num_experts
        local = range(parallel.ep_rank * moe.num_local_experts, (parallel.ep_rank + 1) * moe.num_local_experts)
        table = torch.full((experts,), -1, dtype=torch.int32)
        table[local.start : local.stop] = torch.arange(len(local), dtype=torch.int32)
        manager = SimpleNamespace(
            expert_map=table.to(self.device) if parallel.ep_size > 1 else None, expert_mask=None,
            use_ep=parallel.use_ep,
            placement_strategy=options.pop("placement", "linear"), routing_tables=None, local_num_experts=len(local),
            map_global_to_local=lambda e: e - local.start if e in local else -1, tp_size=parallel.tp_size,
            tp_rank=parallel.tp_rank, ep_size=parallel.ep_size, ep_rank=parallel.ep_rank,
        )  # fmt: skip
        routed = self.module("model_executor.layers.fused_moe.routed_experts").RoutedExperts
        with torch.device(self.device):
            return routed("experts", torch.bfloat16, moe, quantization, manager, **options)

    def load(self, layer: Any, l1: Any, l2: Any) -> None:
        """Read this rank's plain experts in, and process them."""
        self.load_into(layer, l1, l2)
        layer.quant_method.process_weights_after_loading(layer)

    def load_into(self, layer: Any, l1: Any, l2: Any) -> None:
        """Read this rank's plain experts in as a checkpoint's tensors, by vLLM's own loader."""
        first = layer.moe_config.moe_parallel_config.ep_rank * layer.local_num_experts
        scales = "weight_scale_inv" if hasattr(layer, "w13_weight_scale_inv") else "weight_scale"
        for e in range(layer.local_num_experts):
            for what, w13, w2 in (("weight", l1[0], l2[0]), (scales, l1[1], l2[1])):
                half = w13.shape[1] // 2
                parts = {"w1": ("w13", w13[e, :half]), "w3": ("w13", w13[e, half:]), "w2": ("w2", w2[e])}
                for shard, (name, tensor) in parts.items():
                    parameter = getattr(layer, f"{name}_{what}")
                    parameter.weight_loader(parameter, tensor, f"experts.{name}_{what}", shard, first + e)


@contextmanager
def vllm_world(root: Path, device: str = "cpu") -> Iterator[VllmWorld]:
    """vLLM from the folder that has its package, for as long as this is entered."""
    from megamoe_jit.engines import across, aside
    from megamoe_jit.engines.vllm import experts, method, quantization

    with RealSources(root, "vllm", REAL, STAND_INS):
        aside._warned.clear()
        across._buffers.clear()
        for cached in (
            experts.experts_class, experts._pass_through_class, method.fp8_method_class, method.mxfp4_method_class,
            quantization._config_class,
        ):  # fmt: skip
            cached.cache_clear()
        world = VllmWorld(device)
        world.stand_in()
        backends = world.module("model_executor.layers.fused_moe.oracle.fp8").Fp8MoeBackend
        fp8 = world.module("model_executor.layers.quantization.fp8")
        fp8.select_fp8_moe_backend = lambda **_: (backends.TRITON, None)
        backends4 = world.module("model_executor.layers.fused_moe.oracle.mxfp4").Mxfp4MoeBackend
        mxfp4 = world.module("model_executor.layers.quantization.mxfp4")
        mxfp4.select_deepseek_v4_mxfp4_moe_backend = lambda *_: (backends4.MARLIN, None)
        yield world
