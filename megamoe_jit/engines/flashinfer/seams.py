"""What the backend of FlashInfer relies on, and the release it was run with."""

from __future__ import annotations

from functools import partial

from megamoe_jit.engines.seams import Seam, asked, attributes

KERNEL_NAME = "sm90_fp8_fp8_bf16_megamoe_jit"  #: as FlashInfer names kernels: GPU, activations, weights, results
WANTED = "flashinfer-python>=0.7.4,<0.8"
TESTED = ("0.7.4",)

_EP = "flashinfer.moe_ep"
_BASE = f"{_EP}.core.kernel.base"

SEAMS = (
    Seam(f"{_EP}.core.kernel.registry", "register_mega_kernel", "called", "name"),
    Seam(_BASE, "MegaKernelBackend.__init__", "called", "config"),
    Seam(_BASE, "MegaKernelBackend.kernel_name", "replaced", "cls"),
    Seam(_BASE, "MegaKernelBackend.validate_init", "replaced", "self bootstrap fleet_params"),
    Seam(_BASE, "MegaKernelBackend.preprocess_weights", "replaced", "self weights fleet_params"),
    Seam(
        _BASE,
        "MegaKernelBackend.validate_transformed_weights",
        "replaced",
        "self transformed_weights bootstrap fleet_params",
    ),
    Seam(_BASE, "MegaKernelBackend.set_compile_tokens_per_rank", "replaced", "self workspace compile_tokens_per_rank"),
    Seam(_BASE, "MegaKernelBackend._allocate_workspace", "replaced", "self fleet_params"),
    Seam(_BASE, "MegaKernelBackend._workspace_pool_key", "replaced", "self fleet_params"),
    Seam(_BASE, "MegaKernelBackend.stage_inputs", "replaced", "self t workspace quantize_input"),
    Seam(_BASE, "MegaKernelBackend.compute", "replaced", "self workspace transformed_weights output"),
    Seam(_BASE, "MegaKernelBackend.ep_comm_group", "called"),
    Seam(_BASE, "MegaKernelBackend.ep_world_size", "called"),
    *attributes(f"{_EP}.config", "FleetParams", "num_experts max_tokens_per_rank token_hidden_size"),
    *attributes(f"{_EP}.tensors", "MoEEpTensors", "hidden_states topk_ids topk_weights scales"),
    *attributes(f"{_EP}.weights", "MoEWeightPack", "w13 w2 w13_scale w2_scale"),
)

relied_upon = partial(asked, SEAMS, "flashinfer")
