"""The backend: FlashInfer stages a batch into the buffer, and launches."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer import calls
from megamoe_jit._layer import stage as staging
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.given_weights import WeightTensors, check_pairs, format_of
from megamoe_jit._layer.quantize import quantize_weights
from megamoe_jit._layer.weights import is_transformed, transform_weights_for_mega_moe_sm90
from megamoe_jit._spec import FP8, MoEShape
from megamoe_jit.engines.apart import made_apart
from megamoe_jit.engines.flashinfer.seams import KERNEL_NAME
from megamoe_jit.engines.ready import make_ready

_KERNEL = "flashinfer.moe_ep.core.kernel"


def add() -> None:
    """Register the backend under `KERNEL_NAME`."""
    importlib.import_module(f"{_KERNEL}.registry").register_mega_kernel(KERNEL_NAME)(_backend_class())


def _backend_class() -> Any:
    base: Any = importlib.import_module(f"{_KERNEL}.base").MegaKernelBackend

    class MegaMoeBackend(base):  # type: ignore[misc]
        """One launch for dispatch, both products and combine; `config` is a `MegaMoeConfig`."""

        _format = FP8  #: of this layer's weights, which FlashInfer gives before it asks for a workspace

        @classmethod
        def kernel_name(cls) -> str:
            return KERNEL_NAME

        def validate_init(self, bootstrap: Any, fleet_params: Any) -> None:
            self._shape(fleet_params)
            if fleet_params.num_experts % bootstrap.world_size:
                given = f"num_experts = {fleet_params.num_experts}"
                raise ConfigError(f"{given}; allowed: as many on each of the {bootstrap.world_size} ranks")

        def _shape(self, fleet: Any) -> MoEShape:
            config = self._config
            return MoEShape(fleet.token_hidden_size, config.intermediate_size, fleet.num_experts, config.top_k)

        def preprocess_weights(self, weights: Any, fleet_params: Any) -> tuple[WeightTensors, WeightTensors]:
            pairs = _pair(weights.w13, weights.w13_scale), _pair(weights.w2, weights.w2_scale)
            transformed = transform_weights_for_mega_moe_sm90(*pairs, inplace=weights.w13_scale is None)
            self._format = format_of("w13", transformed[0])
            return transformed

        def validate_transformed_weights(self, transformed_weights: Any, bootstrap: Any, fleet_params: Any) -> None:
            l1, l2 = transformed_weights
            self._format = check_pairs(l1, l2, ordered=True)
            if not is_transformed(l1, l2):
                allowed = "what transform_weights_for_mega_moe_sm90 gave"
                raise ConfigError(f"transformed_weights are not in the kernel's order; allowed: {allowed}")

        def set_compile_tokens_per_rank(self, workspace: Any, compile_tokens_per_rank: int | None) -> None:
            """Nothing to choose: kernels serve every count of tokens."""

        def _workspace_pool_key(self, fleet_params: Any) -> Any:
            group, device = self._group(), torch.cuda.current_device() if torch.cuda.is_available() else None
            sizes = self._shape(fleet_params), fleet_params.max_tokens_per_rank
            return KERNEL_NAME, device, id(group), *sizes, self._format.name

        def _group(self) -> Any:
            return self.ep_comm_group if self.ep_world_size > 1 else None

        def _allocate_workspace(self, fleet_params: Any) -> Any:
            shape, tokens = self._shape(fleet_params), fleet_params.max_tokens_per_rank
            sizes = shape.experts, tokens, shape.topk, shape.hidden, shape.intermediate

            def make() -> SymmBuffer:
                made = calls.get_symm_buffer_for_mega_moe(self._group(), *sizes)
                make_ready(made, self._format, tokens)
                return made

            return made_apart(make)

        def stage_inputs(self, t: Any, workspace: Any, *, quantize_input: bool) -> None:
            scales = None if quantize_input else t.scales
            self._staged = staging.stage(workspace, t.hidden_states, t.topk_ids, t.topk_weights, x_scales=scales)

        def compute(self, workspace: Any, transformed_weights: Any, *, output: torch.Tensor | None) -> torch.Tensor:
            tokens, clamp = self._staged, self._config.activation_clamp
            if output is None:
                like = {"dtype": torch.bfloat16, "device": workspace.device}
                output = torch.empty(tokens, workspace.hidden, **like)
            l1, l2 = transformed_weights
            calls.fp8_mega_moe(output[:tokens], l1, l2, workspace, activation_clamp=clamp)
            return output

    return MegaMoeBackend


def _pair(values: torch.Tensor, scales: torch.Tensor | None) -> WeightTensors:
    """Codes and scales: those of a pack that has scales, else quantised."""
    return quantize_weights(values) if scales is None else (values, scales)
