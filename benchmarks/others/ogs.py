"""OpenAI's `triton_kernels`: `matmul_ogs` with MXFP4 weights in its layout for Hopper and bf16 activations.

Called as vLLM's `UnfusedOAITritonExperts` calls it, which is for models with a plain SwiGLU; the routing is made before
what is timed, since its kernels want a top-k that is a power of two. Needs a `triton_kernels` that fits the Triton that
is there; the one inside vLLM's wheel (`vllm/third_party`) fits 3.6.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megamoe_jit._check.scenarios import Inputs, Weights
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._spec import MoEShape

WARPS = 8  #: what vLLM lays the scales out for


def _module(name: str) -> Any:
    return importlib.import_module(f"triton_kernels.{name}")


def _prepared(weights: WeightTensors) -> tuple[Any, Any]:
    """Codes, and how they are to be read."""
    tensor, layout, ogs = _module("tensor"), _module("tensor_details.layout"), _module("matmul_ogs")
    codes, exponents = (part.view(torch.uint8).transpose(-2, -1) for part in weights)
    value, value_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scale, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=WARPS)
    wrapped = tensor.wrap_torch_tensor(codes, dtype=tensor.FP4)
    scales = tensor.convert_layout(tensor.wrap_torch_tensor(exponents), scale, **scale_options)
    flex = ogs.FlexCtx(rhs_data=_module("numerics").InFlexData())
    return tensor.convert_layout(wrapped, value, **value_options), ogs.PrecisionConfig(
        weight_scale=scales, flex_ctx=flex
    )


class TritonKernels:
    """The layer by two `matmul_ogs`."""

    name = "triton_kernels, bf16 activations"
    exact_activations = True

    def __init__(self, weights: Weights, shape: MoEShape, clamp: float, tokens: Sequence[int]) -> None:
        _module("matmul_ogs_details.opt_flags").update_opt_flags_constraints({"split_k": 1})
        self.shape, self.clamp = shape, clamp
        self.w13, self.w2 = _prepared(weights.l1), _prepared(weights.l2)

    def _routing(self, inputs: Inputs) -> tuple[Any, Any, Any]:
        """Routing, gather and scatter of the slots in the order of their experts."""
        routing, experts = _module("routing"), self.shape.experts
        tokens, topk = inputs.topk_idx.shape
        flat = inputs.topk_idx.reshape(-1)
        order = torch.sort(flat, stable=True).indices
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=order.device)
        counts = torch.bincount(flat, minlength=experts).to(torch.int32)
        gates = inputs.topk_weights.reshape(-1)[order].contiguous()
        order, place = order.to(torch.int32), place.to(torch.int32)
        data = routing.compute_expt_data(counts, experts, tokens * topk)
        made = routing.RoutingData(gates, counts, experts, topk, data)
        gather = routing.GatherIndx(src_indx=order, dst_indx=place)
        return made, gather, routing.ScatterIndx(src_indx=place, dst_indx=order)

    def build(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """The layer for fixed inputs; each call returns bfloat16 ``[T, H]``."""
        from benchmarks.others.between import swiglu_into  # needs Triton

        matmul_ogs = _module("matmul_ogs").matmul_ogs
        data, gather, scatter = self._routing(inputs)
        slots = inputs.topk_idx.numel()
        hidden = torch.empty(slots, self.shape.intermediate, dtype=torch.bfloat16, device=inputs.x.device)
        (w13, read13), (w2, read2) = self.w13, self.w2

        def call() -> torch.Tensor:
            gated = matmul_ogs(inputs.x, w13, None, data, gather_indx=gather, precision_config=read13)
            swiglu_into(hidden, gated.view(slots, -1), self.clamp)
            out = matmul_ogs(
                hidden, w2, None, data, scatter_indx=scatter, precision_config=read2, gammas=data.gate_scal
            )
            return out.view(inputs.x.shape)  # type: ignore[no-any-return]

        return call
