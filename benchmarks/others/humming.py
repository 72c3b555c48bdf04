"""Humming, kernels of vLLM for quantised weights, called as vLLM's experts of that name call them.

Weights are expanded in registers and multiplied by WGMMA, with activations in bf16 or FP8; kernels are compiled by its
own JIT. `Indexed` products find the rows of an expert by their numbers, which vLLM takes on one rank; `Grouped` ones
have them side by side, which it takes with expert parallelism. Needs `humming-kernels` and `vllm_ops`; written for
humming-kernels 0.1.20.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.others.vllm_ops import aligned, grouped, ops
from megamoe_jit._check.scenarios import Inputs, Weights
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._spec import MoEShape

BF16 = {"quant_method": "humming", "dtype": "bfloat16"}
FP8_ROW = {"quant_method": "humming", "dtype": "float8e4m3"}  #: a scale for each row
FP8_128 = {**FP8_ROW, "group_size": 128}  #: a scale for 128 columns, as this layer has them
SWIGLU = """[](float a, float b) {{
    const float gate = fminf(a, {clamp}f);
    return gate / (1.f + expf(-gate)) * fmaxf(fminf(b, {clamp}f), -{clamp}f);
}}(a, b)"""


def _for_these(choices: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    """The configurations of some ascending counts of slots, each for those up to its own, the last for all above."""
    chosen = [next(config for low, high, config in choices if low < count <= high) for count in counts]
    lows, highs = [0, *counts[:-1]], [*counts[:-1], 1 << 30]
    return [list(choice) for choice in zip(lows, highs, chosen, strict=True)]


@dataclass(frozen=True)
class Product:
    """One of the two products: its weights, and how its kernels are configured."""

    config: Any
    weight: dict[str, torch.Tensor | None]
    compute: str
    choices: list[Any]  #: (more slots than, at most, configuration)

    def block(self, slots: int) -> int:
        """Rows of a block of the configuration for so many slots."""
        return next(config["block_shape"][0] for low, high, config in self.choices if low < slots <= high)  # type: ignore[no-any-return]

    def __call__(self, x: torch.Tensor, out: torch.Tensor, slots: int, where: dict[str, Any], **before: Any) -> None:
        """Multiply rows of activations, which are prepared as `before` says.

        Args:
            x: bfloat16, before it is quantised.
            out: bfloat16 ``[slots, N]``.
            slots: how many there are.
            where: which rows are of which expert.
            before: activation and order, for Humming's own kernel, which quantises too.
        """
        library: Any = importlib.import_module("humming.forward")
        given, groups, rows = library.may_process_input(self.config, inputs=x, **before)
        scales = groups if self.config.input_quant_mode.has_group_scale else rows
        settings = {"compute_config": self.compute, "tuning_config": json.dumps(self.choices), "valid_shape_m": slots}
        library.humming_forward(
            self.config, inputs=given, input_scale=scales, outputs=out, **where, **settings, **self.weight
        )


def _product(weights: WeightTensors, activations: dict[str, Any], gemm: str, counts: Sequence[int]) -> Product:
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
    config, compute = layer.humming_config, json.dumps({"gemm_type": gemm})
    heuristics = importlib.import_module("humming.tune").get_heuristics_config
    choices = _for_these(heuristics(layer_config=config, gemm_type=gemm, device=codes.device), sorted(counts))
    importlib.import_module("humming.kernel.humming").HummingKernel.prepare_kernels(  # compiles them side by side
        config.to_str(), compute, json.dumps(choices), codes.device
    )
    parts = ("weight", "weight_scale", "zero_point", "bias", "weight_scale_2", "locks")
    return Product(config, {name: getattr(layer, name, None) for name in parts}, compute, choices)


class _Humming:
    """The layer by Humming's two products; `activations` is what they multiply, `gemm` how they find their rows."""

    name: str
    exact_activations: bool
    activations: dict[str, Any]
    gemm: str

    def __init__(self, weights: Weights, shape: MoEShape, clamp: float, tokens: Sequence[int]) -> None:
        self.shape = shape
        impl = SWIGLU.format(clamp=float(clamp))
        self.swiglu = {"activation_type": "binary_split", "activation_impl": impl}
        counts = [count * shape.topk for count in tokens]
        self.w13, self.w2 = (_product(each, self.activations, self.gemm, counts) for each in (weights.l1, weights.l2))

    def _outputs(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the two products, and of the layer."""
        tokens, slots = inputs.topk_idx.shape[0], inputs.topk_idx.numel()
        sizes = (slots, 2 * self.shape.intermediate), (slots, self.shape.hidden), (tokens, self.shape.hidden)
        gated, parts, y = (torch.empty(size, dtype=torch.bfloat16, device=inputs.x.device) for size in sizes)
        return gated, parts, y


class Indexed(_Humming):
    """Products that find the rows of their experts by numbers."""

    gemm = "indexed"

    def build(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """The layer for fixed inputs; each call returns bfloat16 ``[T, H]``."""
        from benchmarks.others.between import weighted_sum_into  # needs Triton

        idx, (gated, parts, y) = inputs.topk_idx.to(torch.int32), self._outputs(inputs)
        slots, topk = idx.numel(), idx.shape[1]
        blocks = [each.block(slots) for each in (self.w13, self.w2)]

        def call() -> torch.Tensor:
            found = {block: aligned(idx, self.shape.experts, block) for block in dict.fromkeys(blocks)}
            names = "sorted_ids", "expert_ids", "num_tokens_padded"
            first, second = (dict(zip(names, found[block], strict=True)) for block in blocks)
            self.w13(inputs.x, gated, slots, {**first, "top_k": topk})
            self.w2(gated, parts, slots, {**second, "top_k": 1}, **self.swiglu)
            return weighted_sum_into(y, parts, inputs.topk_weights)

        return call


class Grouped(_Humming):
    """Products of rows that lie side by side, expert by expert."""

    gemm = "grouped_contiguous"

    def build(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """The layer for fixed inputs; each call returns bfloat16 ``[T, H]``."""
        idx, (gated, parts, y) = inputs.topk_idx.to(torch.int32), self._outputs(inputs)
        slots, topk = idx.numel(), idx.shape[1]
        sort = grouped(idx, self.shape.experts)

        def call() -> torch.Tensor:
            ends, places = sort()
            where, valid = {"expert_layout": ends}, {"num_valid_tokens": ends[-1:]}
            self.w13(inputs.x, gated, slots, where, layout="scatter", scatter_idx=places, **valid)
            self.w2(gated, parts, slots, where, **self.swiglu, **valid)
            rows = parts.view(*idx.shape, -1)
            ops().moe_unpermute(rows, inputs.topk_weights, places.flatten(), ends, topk, y)
            return y

        return call


def _kind(of: type[Indexed] | type[Grouped], what: str, activations: dict[str, Any]) -> type[Indexed] | type[Grouped]:
    """One of the two with some activations, as a class of its own."""
    how = of.__name__.lower()
    own = {"name": f"Humming {how}, {what}", "activations": activations, "exact_activations": activations is BF16}
    return type(f"{of.__name__}{what}", (of,), own)


KINDS = tuple(
    _kind(of, what, activations)
    for what, activations in (
        ("bf16 activations", BF16),
        ("FP8 activations per 128", FP8_128),
        ("FP8 activations per row", FP8_ROW),
    )
    for of in (Indexed, Grouped)
)
