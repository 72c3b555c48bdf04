"""Humming, vLLM's kernels for MXFP4 weights on Hopper since 0.33, called as its `HummingIndexedExperts` calls them.

Weights are expanded in registers and multiplied by WGMMA, with bf16 or FP8 activations; kernels are compiled by its own
JIT. Needs `humming-kernels` and `vllm_ops`; written for humming-kernels 0.1.20.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.others.vllm_ops import aligned
from megamoe_jit._check.scenarios import Inputs, Weights
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._spec import MoEShape

__all__ = ["Humming", "HummingBf16", "HummingFp8", "HummingFp8Token"]

INDEXED = "indexed"
COMPUTE = json.dumps({"gemm_type": INDEXED})
SWIGLU = """[](float a, float b) {{
    const float gate = fminf(a, {clamp}f);
    return gate / (1.f + expf(-gate)) * fmaxf(fminf(b, {clamp}f), -{clamp}f);
}}(a, b)"""


@dataclass(frozen=True)
class Product:
    """One of the two products: its weights and configurations."""

    config: Any
    weight: dict[str, torch.Tensor | None]
    choices: list[Any]  #: (more slots than, at most, configuration)

    def block(self, slots: int) -> int:
        """Rows of a block of the configuration for so many slots."""
        return next(config["block_shape"][0] for low, high, config in self.choices if low < slots <= high)  # type: ignore[no-any-return]


def _for_these(choices: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    """The configurations of some ascending counts of slots, each for those up to its own, the last for all above."""
    chosen = [next(config for low, high, config in choices if low < count <= high) for count in counts]
    lows, highs = [0, *counts[:-1]], [*counts[:-1], 1 << 30]
    return [list(choice) for choice in zip(lows, highs, chosen, strict=True)]


def _product(weights: WeightTensors, activations: dict[str, Any], counts: Sequence[int]) -> Product:
    """Of one matrix of all experts; `counts` are the slots that it will be called with."""
    codes, exponents = weights
    with torch.device(codes.device):
        layer = importlib.import_module("humming.layer").HummingLayer(
            shape_n=codes.shape[1],
            shape_k=2 * codes.shape[2],
            weight_config={"quant_method": "mxfp4"},
            input_config=dict(activations),
            num_experts=codes.shape[0],
            torch_dtype=torch.bfloat16,
        )
    layer.load_from_tensors({"weight": codes, "weight_scale": exponents.view(torch.uint8)})
    layer.transform()
    choices = importlib.import_module("humming.tune").get_heuristics_config(
        layer_config=layer.humming_config, gemm_type=INDEXED, device=codes.device
    )
    choices = _for_these(choices, sorted(counts))
    importlib.import_module("humming.kernel.humming").HummingKernel.prepare_kernels(  # compiles them side by side
        layer.humming_config.to_str(), COMPUTE, json.dumps(choices), codes.device
    )
    parts = ("weight", "weight_scale", "zero_point", "bias", "weight_scale_2", "locks")
    return Product(layer.humming_config, {name: getattr(layer, name, None) for name in parts}, choices)


class Humming:
    """The layer by Humming's two products; `activations` is what they multiply."""

    name = "Humming"
    exact_activations = False
    activations: dict[str, Any]

    def __init__(self, weights: Weights, shape: MoEShape, clamp: float, tokens: Sequence[int]) -> None:
        self.shape, self.clamp = shape, clamp
        counts = [count * shape.topk for count in tokens]
        self.w13, self.w2 = (_product(each, self.activations, counts) for each in (weights.l1, weights.l2))

    def build(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """The layer for fixed inputs; each call returns bfloat16 ``[T, H]``."""
        from benchmarks.others.between import weighted_sum_into  # needs Triton

        library: Any = importlib.import_module("humming.forward")
        shape, experts = self.shape, self.shape.experts
        tokens, topk = inputs.topk_idx.shape
        slots, idx = tokens * topk, inputs.topk_idx.to(torch.int32)
        made: dict[str, Any] = {"dtype": torch.bfloat16, "device": idx.device}
        gated = torch.empty(slots, 2 * shape.intermediate, **made)
        parts, y = torch.empty(slots, shape.hidden, **made), torch.empty(tokens, shape.hidden, **made)
        impl = SWIGLU.format(clamp=float(self.clamp))
        activation = {"activation_type": "binary_split", "activation_impl": impl}
        blocks = [each.block(slots) for each in (self.w13, self.w2)]

        def product(of: Product, x: torch.Tensor, out: torch.Tensor, top_k: int, where: Any, **before: Any) -> None:
            given, groups, rows = library.may_process_input(of.config, inputs=x, **before)
            sorted_ids, owners, used = where
            library.humming_forward(
                of.config,
                inputs=given,
                input_scale=groups if of.config.input_quant_mode.has_group_scale else rows,
                outputs=out,
                top_k=top_k,
                sorted_ids=sorted_ids,
                expert_ids=owners,
                num_tokens_padded=used,
                valid_shape_m=slots,
                compute_config=COMPUTE,
                tuning_config=json.dumps(of.choices),
                **of.weight,
            )

        def call() -> torch.Tensor:
            orders = {block: aligned(idx, experts, block) for block in dict.fromkeys(blocks)}
            product(self.w13, inputs.x, gated, topk, orders[blocks[0]])
            product(self.w2, gated, parts, 1, orders[blocks[1]], **activation)
            return weighted_sum_into(y, parts, inputs.topk_weights)

        return call


class HummingBf16(Humming):
    """With activations in bf16."""

    name = "Humming, bf16 activations"
    exact_activations = True
    activations = {"quant_method": "humming", "dtype": "bfloat16"}


class HummingFp8(Humming):
    """With activations in e4m3, a scale for 128 of them, as this layer has them."""

    name = "Humming, FP8 activations per 128"
    activations = {"quant_method": "humming", "dtype": "float8e4m3", "group_size": 128}


class HummingFp8Token(Humming):
    """With activations in e4m3, a scale for each row."""

    name = "Humming, FP8 activations per row"
    activations = {"quant_method": "humming", "dtype": "float8e4m3"}
