"""SGLang's own MoE sources on any machine: the modules that the plug-in meets are real, the rest stands in."""

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

__all__ = ["SglangWorld", "sglang_world"]

_MOE = "sglang.srt.layers.moe"
REAL = (
    "sglang.srt.arg_groups.choices",
    "sglang.srt.arg_groups.mega_moe_hook",
    "sglang.srt.environ",
    f"{_MOE}.fused_moe_triton.layer",
    f"{_MOE}.mega_moe",
    f"{_MOE}.mega_moe_sm90",
    f"{_MOE}.moe_runner.base",
    f"{_MOE}.moe_runner.runner",
    f"{_MOE}.token_dispatcher.base",
    f"{_MOE}.token_dispatcher.standard",
    f"{_MOE}.topk",
    f"{_MOE}.utils",
    "sglang.srt.layers.quantization.base_config",
    "sglang.srt.layers.quantization.fp8",
    "sglang.srt.plugins",
    "sglang.srt.plugins.hook_registry",
)
STAND_INS = ("triton", "deep_gemm", "sgl_kernel", "flashinfer", "compressed_tensors", "aiter", "msgspec")
ENTRY = EntryPoint("megamoe_jit", "megamoe_jit.engines.sglang:register", "sglang.srt.plugins")


class SglangWorld:
    """One rank of an SGLang whose parallelism, backends and group are what a test says."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.moe = SimpleNamespace(
            a2a_backend=None, runner_backend=None, in_speculative_scope=False, disable_fp4_allgather=True
        )
        self.model = SimpleNamespace(load_format="auto")
        self.group: Any = SimpleNamespace(size=lambda: 1)
        self.parallel = SimpleNamespace(
            moe_ep_size=1, moe_ep_rank=0, moe_tp_size=1, moe_tp_rank=0, tp_size=1,
            moe_ep_group=SimpleNamespace(device_group=self.group), tp_group=None,
        )  # fmt: skip

    def module(self, name: str) -> Any:
        return importlib.import_module(f"sglang.srt.{name}")

    def stand_in(self) -> None:
        """What the real modules ask of others when they are imported, and later."""
        exec_moe = SimpleNamespace(
            enable_w4a4_mxfp4_megamoe=False, enable_paged_experts=False, ep_join_mode="none",
            disable_flashinfer_cutlass_moe_fp4_allgather=True, moe_runner_backend="auto",
        )  # fmt: skip
        context = self.module("runtime_context")
        context.get_flags = lambda: SimpleNamespace(moe=self.moe)
        context.get_parallel = lambda: self.parallel
        context.get_model = lambda: self.model
        context.get_exec = lambda: SimpleNamespace(moe=exec_moe)
        context.get_lora = lambda: SimpleNamespace(enable_lora=False, lora_paths=None)
        platform = SimpleNamespace(is_sm90=True, is_sm100=False, is_sm120=False, is_cuda=True, is_hip=False)
        context.get_platform = lambda: platform
        self.module("models.deepseek_common.utils")._device_sm = 90
        self.module("eplb.expert_location").get_global_expert_location_metadata = lambda: None
        layers = self.module("layers.moe.kt_ep_wrapper")
        layers.create_kt_config_from_server_args = lambda *_: None
        self.module("utils.common").get_device = lambda: self.device
        self.module("utils").set_weight_attrs = lambda tensor, attributes: vars(tensor).update(attributes)

    def start(self, *, a2a: str = "none", runner: str = "auto") -> None:
        """Load plug-ins as each process of SGLang does, then choose backends as its command line does."""
        self.module("plugins").entry_points = lambda group: [ENTRY] if group == ENTRY.group else []
        self.module("plugins").load_plugins()
        utils = self.module("layers.moe.utils")
        assert runner in self.module("arg_groups.choices").MOE_RUNNER_BACKEND_CHOICES
        self.moe.a2a_backend = utils.MoeA2ABackend(a2a)
        self.moe.runner_backend = utils.resolve_moe_runner_backend(runner)

    def layer(self, shape: Any, *, fp4: bool = False, **options: Any) -> Any:
        """A real `FusedMoE` with FP8 blocks or MXFP4, not yet loaded; `shape.intermediate` is of one rank."""
        fp8 = self.module("layers.quantization.fp8")
        config = fp8.Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128], is_fp4_experts=fp4)
        options.setdefault("quant_method", fp8.Fp8MoEMethod(config))
        with torch.device(self.device):
            return self.module("layers.moe.fused_moe_triton.layer").FusedMoE(
                num_experts=shape.experts * self.parallel.moe_ep_size,
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate * self.parallel.moe_tp_size,
                layer_id=0,
                top_k=shape.topk,
                quant_config=config,
                **options,
            )

    def load(self, layer: Any, l1: Any, l2: Any, experts: Any = None) -> None:
        """Read plain experts in as a checkpoint's tensors, by SGLang's own loader, and process them."""
        first = self.parallel.moe_ep_rank * layer.num_local_experts
        for e in range(layer.num_local_experts) if experts is None else experts:
            for what, w13, w2 in (("weight", l1[0], l2[0]), ("weight_scale_inv", l1[1], l2[1])):
                rows = w13.shape[1] // 2
                parts = {"w1": ("w13", w13[e, :rows]), "w3": ("w13", w13[e, rows:]), "w2": ("w2", w2[e])}
                for shard, (name, tensor) in parts.items():
                    parameter = getattr(layer, f"{name}_{what}")
                    layer.weight_loader(parameter, tensor, f"experts.{e}.{shard}.{what}", shard, first + e)
        layer.quant_method.process_weights_after_loading(layer)


@contextmanager
def sglang_world(root: Path, device: str = "cpu") -> Iterator[SglangWorld]:
    """SGLang from the folder that has its package, for as long as this is entered."""
    from megamoe_jit.engines import across, aside, sglang
    from megamoe_jit.engines.sglang import mega, runner

    with RealSources(root, "sglang", REAL, STAND_INS):
        sglang._registered = False
        aside._warned.clear()
        across._buffers.clear()
        mega._formats.clear()
        mega._all_in_place.cache_clear()
        runner._core_class.cache_clear()
        world = SglangWorld(device)
        world.stand_in()
        try:
            yield world
        finally:
            torch.set_grad_enabled(True)
