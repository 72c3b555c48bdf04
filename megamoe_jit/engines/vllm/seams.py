"""What the plug-in of vLLM relies on, and the releases it was run with."""

from __future__ import annotations

from functools import partial

from megamoe_jit.engines.seams import Seam, asked, attributes

WANTED = "vllm>=0.31,<0.34"
TESTED = ("0.31.0", "0.32.0", "0.33.0")

MOE = "vllm.model_executor.layers.fused_moe"
QUANT = "vllm.model_executor.layers.quantization"
_MK = f"{MOE}.modular_kernel"
_EXPERTS = "FusedMoEExpertsModular"
_AROUND, _PASS = f"{MOE}.prepare_finalize.no_dp_ep", "MoEPrepareAndFinalizeNoDPEPModular"
_BASE = f"{QUANT}.base_config"

SEAMS = (
    Seam(_MK, "FusedMoEExperts.__init__", "called", "moe_config quant_config"),
    Seam(_MK, "FusedMoEExperts.is_supported_config"),
    Seam(_MK, "FusedMoEExperts.activation_format", "replaced"),
    Seam(_MK, "FusedMoEExperts._supports_current_device", "replaced"),
    Seam(_MK, "FusedMoEExperts._supports_no_act_and_mul", "replaced"),
    Seam(_MK, "FusedMoEExperts._supports_quant_scheme", "replaced", "weight_key activation_key"),
    Seam(_MK, "FusedMoEExperts._supports_activation", "replaced", "activation"),
    Seam(_MK, "FusedMoEExperts._supports_parallel_config", "replaced", "moe_parallel_config"),
    Seam(_MK, "FusedMoEExperts._supports_shape", "replaced", "hidden_dim"),
    Seam(_MK, "FusedMoEExperts.expects_unquantized_inputs", "replaced", "self"),
    Seam(_MK, "FusedMoEExperts.process_weights_after_loading", "replaced", "self layer"),
    Seam(_MK, f"{_EXPERTS}.finalize_weight_and_reduce_impl", "replaced", "self"),
    Seam(
        _MK,
        f"{_EXPERTS}.workspace_shapes",
        "replaced",
        "self M N K topk global_num_experts local_num_experts expert_tokens_meta activation",
    ),
    Seam(
        _MK,
        f"{_EXPERTS}.apply",
        "replaced",
        "self output hidden_states w1 w2 topk_weights topk_ids activation global_num_experts expert_map a1q_scale "
        "a2_scale workspace13 workspace2 expert_tokens_meta apply_router_weight_on_input",
    ),
    Seam(_MK, "FusedMoEKernel.__init__", "called", "prepare_finalize fused_experts"),
    Seam(_MK, "FusedMoEActivationFormat.Standard"),
    Seam(f"{MOE}.topk_weight_and_reduce", "TopKWeightAndReduceNoOP"),
    Seam(f"{MOE}.activation", "MoEActivation.SILU"),
    Seam(
        _AROUND,
        f"{_PASS}.prepare",
        "replaced",
        "self a1 topk_weights topk_ids num_experts expert_map apply_router_weight_on_input quant_config "
        "defer_input_quant",
    ),
    Seam(_AROUND, f"{_PASS}.output_is_reduced", "replaced", "self"),
    Seam(
        f"{MOE}.all2all_utils",
        "maybe_make_prepare_finalize",
        "wrapped",
        "moe quant_config routing_tables allow_new_interface use_monolithic",
    ),
    *attributes(
        f"{MOE}.config",
        "FusedMoEConfig",
        "num_experts num_local_experts experts_per_token hidden_dim max_num_tokens has_bias is_lora_enabled "
        "swiglu_limit swiglu_alpha swiglu_beta skip_final_all_reduce intermediate_size_per_partition "
        "moe_parallel_config moe_backend",
    ),
    *attributes(
        f"{MOE}.config", "FusedMoEParallelConfig", "use_all2all_kernels use_batched_activation_format ep_size ep_rank"
    ),
    Seam(f"{MOE}.routed_experts", "RoutedExperts.expert_map", "called"),
    Seam(f"{MOE}.routed_experts", "RoutedExperts.update_expert_map_info"),
    Seam(f"{MOE}.fused_moe_method_base", "FusedMoEMethodBase"),
    Seam(f"{MOE}.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod"),
    Seam(f"{QUANT}.utils.quant_utils", "kFp8Static128BlockSym"),
    Seam(f"{QUANT}.utils.quant_utils", "kFp8Dynamic128Sym"),
    Seam(f"{QUANT}.fp8", "Fp8MoEMethod.__init__", "called", "quant_config layer"),
    Seam(f"{QUANT}.fp8", "Fp8MoEMethod.process_weights_after_loading", "replaced", "self layer"),
    Seam(f"{QUANT}.fp8", "Fp8MoEMethod.get_fused_moe_quant_config", "called", "layer"),
    Seam(f"{QUANT}.fp8", "Fp8MoEMethod.create_weights", "wrapped", "self layer"),
    Seam(f"{QUANT}.fp8", "Fp8MoEMethod.apply"),
    Seam(f"{QUANT}.mxfp4", "Mxfp4MoEMethod.__init__", "called", "moe"),
    Seam(f"{QUANT}.mxfp4", "Mxfp4MoEMethod.process_weights_after_loading", "replaced", "self layer"),
    Seam(f"{QUANT}.mxfp4", "Mxfp4MoEMethod.get_fused_moe_quant_config", "called", "layer"),
    Seam(f"{QUANT}.mxfp4", "Mxfp4MoEMethod.create_weights", "wrapped", "self layer"),
    Seam(f"{QUANT}.mxfp4", "Mxfp4MoEMethod.apply"),
    Seam(f"{MOE}.oracle.mxfp4", "Mxfp4MoeBackend.EMULATION"),
    Seam(f"{QUANT}.utils.quant_utils", "kMxfp4Static"),
    Seam(
        "vllm.models.deepseek_v41.quant_config", "DeepseekV4FP8Config.get_quant_method", "replaced", "self layer prefix"
    ),
    Seam(f"{QUANT}.fp8", "Fp8Config.get_quant_method", "replaced", "self layer prefix"),
    Seam(_BASE, "QuantizationConfig.get_name", "replaced", "self"),
    Seam(_BASE, "QuantizationConfig.get_supported_act_dtypes", "replaced", "self"),
    Seam(_BASE, "QuantizationConfig.get_min_capability", "replaced", "cls"),
    Seam(_BASE, "QuantizationConfig.get_config_filenames", "replaced"),
    Seam(_BASE, "QuantizationConfig.from_config", "replaced", "cls config"),
    Seam(_BASE, "QuantizationConfig.get_quant_method", "replaced", "self layer prefix"),
    Seam(f"{QUANT}.fp8", "Fp8Config.from_config", "called", "config"),
    Seam(
        _BASE, "QuantizationConfig.override_quantization_method", "replaced", "cls hf_quant_cfg user_quant", "hf_config"
    ),
    Seam(QUANT, "register_quantization_config", "called", "quantization"),
    Seam(f"{MOE}.oracle.fp8", "Fp8MoeBackend.TRITON"),
    Seam("vllm.distributed.parallel_state", "get_ep_group", "called"),
    Seam("vllm.config.vllm", "get_current_vllm_config_or_none", "called"),
    Seam("vllm.distributed.eplb.eplb_utils", "override_envs_for_eplb", "replaced", "parallel_config moe_backend"),
)

relied_upon = partial(asked, SEAMS, "vllm")
