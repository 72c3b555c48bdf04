"""What the plug-in of SGLang relies on, and the releases it was run with."""

from __future__ import annotations

from functools import partial

from megamoe_jit.engines.seams import Seam, asked, attributes

WANTED = "sglang>=0.5.22,<0.6"
TESTED = ("0.5.22", "0.5.23")

_REGISTRY = "sglang.srt.plugins.hook_registry"
_MOE = "sglang.srt.layers.moe"
_QUANT = "sglang.srt.layers.quantization"

#: Of both openings: how hooks are made, and when weights are read in, and read in again.
SHARED = (
    Seam(_REGISTRY, "HookRegistry.register", "called", "target hook hook_type"),
    Seam(_REGISTRY, "HookType.AROUND"),
    Seam(f"{_QUANT}.base_config", "QuantizeMethodBase.restore_weights_before_loading", "wrapped", "self layer"),
    Seam(f"{_QUANT}.fp8", "Fp8MoEMethod.process_weights_after_loading", "wrapped", "self layer"),
    Seam(f"{_QUANT}.fp8", "Fp8MoEMethod.apply", "wrapped", "self layer dispatch_output"),
    Seam("sglang.srt.runtime_context", "get_model", "called"),
    *attributes(
        f"{_MOE}.moe_runner.base",
        "MoeRunnerConfig",
        "activation is_gated apply_router_weight_on_input gemm1_alpha gemm1_beta gemm1_clamp_limit",
    ),
    Seam(f"{_MOE}.fused_moe_triton.layer", "FusedMoE.weight_loader", "wrapped", "self param"),
    Seam(f"{_MOE}.fused_moe_triton.layer", "FusedMoE.weight_loader_fused", "wrapped", "self param"),
)

#: Of `--moe-a2a-backend megamoe`.
MEGA = (
    Seam(f"{_MOE}.mega_moe_sm90", "build_sm90_mega_moe_experts_weights", "replaced", "experts"),
    Seam(f"{_MOE}.mega_moe_sm90", "is_sm90_fp8_mega_moe_available", "replaced", "experts"),
    Seam(
        f"{_MOE}.mega_moe_sm90",
        "run_sm90_mega_routed",
        "replaced",
        "experts hidden_states topk_ids topk_weights buf num_tokens hidden_size activation_clamp routed_scaling_factor",
    ),
    Seam(
        f"{_MOE}.mega_moe",
        "_get_mega_moe_symm_buffer",
        "replaced",
        "group num_experts num_max_tokens_per_rank num_topk hidden intermediate_hidden num_shared_experts mma_type",
        "activation",
    ),
    Seam(f"{_MOE}.mega_moe", "build_mega_moe_experts_weights", "replaced", "experts"),
    Seam(f"{_MOE}.mega_moe", "run_mega_routed_experts"),
    Seam(f"{_MOE}.mega_moe", "is_mega_moe_experts_ready"),
    Seam(
        "sglang.srt.arg_groups.mega_moe_hook",
        "mega_moe_needs_token_budget",
        "replaced",
        "model_arch hf_quant_config quantization",
    ),
    Seam("sglang.srt.runtime_context", "get_platform", "called"),
)

#: Of `--moe-runner-backend megamoe_jit`.
RUNNER = (
    Seam("sglang.srt.arg_groups.choices", "add_moe_runner_backend_choices"),
    Seam(f"{_MOE}.moe_runner.runner", "register_moe_runner_core", "called", "backend_name factory"),
    Seam(f"{_MOE}.moe_runner.runner", "MoeRunner.__init__", "called", "runner_backend config"),
    Seam(f"{_MOE}.moe_runner.runner", "MoeRunner.run", "called", "dispatch_output quant_info"),
    Seam(
        f"{_MOE}.moe_runner.base",
        "DispatchMoeRunnerCore.run_from_dispatch",
        "replaced",
        "self dispatch_output quant_info runner_config hooks",
    ),
    *attributes(
        f"{_MOE}.moe_runner.base",
        "MoeRunnerConfig",
        "no_combine top_k swiglu_limit routed_scaling_factor hidden_size intermediate_size_per_partition "
        "num_local_experts",
    ),
    Seam(f"{_MOE}.token_dispatcher.standard", "StandardDispatchOutput.topk_output"),
    Seam(f"{_MOE}.token_dispatcher.standard", "StandardCombineInput.hidden_states"),
    Seam(f"{_MOE}.utils", "RegisteredMoeRunnerBackend.value"),
    Seam(f"{_MOE}.utils", "get_moe_runner_backend", "called"),
    Seam(f"{_MOE}.utils", "get_moe_a2a_backend", "called"),
    Seam(f"{_MOE}.utils", "MoeA2ABackend.is_none", "called"),
    Seam(f"{_MOE}.utils", "MoeA2ABackend.is_megamoe", "called"),
    Seam(f"{_QUANT}.fp8", "Fp8MoEMethod.create_moe_runner", "wrapped", "self layer moe_runner_config"),
    Seam("sglang.srt.runtime_context", "get_parallel", "called"),
)

relied_upon = partial(asked, (*SHARED, *MEGA, *RUNNER), "sglang")
