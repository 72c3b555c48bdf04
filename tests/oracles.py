"""Independent oracles: the MoE modules of transformers, in FP32, with their own routers.

Nothing of this package computes here but the dequantisation of the shared inputs, so routing, weight layout,
clamp and weighting are checked against other hands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from megamoe_jit._check.scenarios import Weights
from megamoe_jit._layer.quantize import dequantize_activations, dequantize_weights, quantize_activations
from megamoe_jit._spec import MoEShape


@dataclass(frozen=True)
class Model:
    """Where transformers keeps one model's MoE layer, and how its configuration is filled."""

    name: str
    prefix: str  #: of the class names
    router: str  #: class name of the router without the prefix
    extra: Callable[[MoEShape], dict[str, Any]]
    clamp: float | None = None  #: bound the experts apply to gate and up
    experts_key: str = "n_routed_experts"

    def config(self, shape: MoEShape, **more: Any) -> Any:
        """A configuration with the sizes of `shape`, set to run the plain loop over experts."""
        module = import_module(f"transformers.models.{self.name}.configuration_{self.name}")
        config = getattr(module, f"{self.prefix}Config")(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.intermediate,
            num_experts_per_tok=shape.topk,
            **{self.experts_key: shape.experts},
            **{**self.extra(shape), **more},
        )
        config._experts_implementation = "eager"
        return config

    def build(self, part: str, config: Any, device: torch.device | str) -> torch.nn.Module:
        """An FP32 module of the model with parameters not yet set."""
        module = import_module(f"transformers.models.{self.name}.modeling_{self.name}")
        with torch.device(device):
            return getattr(module, self.prefix + part)(config).float()


def _groups(shape: MoEShape) -> dict[str, Any]:
    """Expert groups as in DeepSeek-V3: half of the groups stay, and hold at least `topk` experts."""
    groups = next(g for g in (8, 4, 2, 1) if shape.experts % (2 * g) == 0 and shape.experts // 2 >= shape.topk)
    return {"n_group": groups, "topk_group": max(1, groups // 2), "routed_scaling_factor": 2.5}


MODELS = {
    model.name: model
    for model in (
        Model("deepseek_v3", "DeepseekV3", "TopkRouter", _groups),
        Model("deepseek_v4", "DeepseekV4", "TopKRouter", lambda _: {"swiglu_limit": 10.0}, clamp=10.0),
        Model("qwen3_moe", "Qwen3Moe", "TopKRouter", lambda _: {"norm_topk_prob": True}, experts_key="num_experts"),
        Model("mimo_v2_flash", "MiMoV2Flash", "TopkRouter", lambda _: {}),
    )
}


@dataclass(frozen=True)
class Sample:
    """Inputs of one layer, routed by the model's own router."""

    x_q: torch.Tensor  #: float8_e4m3fn [T, H]
    x_sf: torch.Tensor  #: float32 [T, H / 128]
    topk_idx: torch.Tensor  #: int64 [T, K]
    topk_weights: torch.Tensor  #: float32 [T, K]


def structured_states(tokens: int, hidden: int, gen: torch.Generator, topics: int = 6) -> torch.Tensor:
    """Hidden states around topics of unequal weight, with a few large channels; float32 ``[T, H]``.

    A router sees them as it sees text: neighbouring tokens agree, some experts are hot.
    """
    device = gen.device
    centres = torch.randn(topics, hidden, generator=gen, device=device)
    popularity = 1.0 / torch.arange(1, topics + 1, device=device)
    topic = torch.multinomial(popularity, tokens, replacement=True, generator=gen)
    x = centres[topic] + 0.7 * torch.randn(tokens, hidden, generator=gen, device=device)
    large = torch.rand(hidden, generator=gen, device=device) < 0.01
    return torch.where(large, 4.0 * x, x)


@torch.no_grad()
def sample(
    model: Model, shape: MoEShape, tokens: int, device: torch.device | str, seed: int = 0, scale: float = 1.0
) -> Sample:
    """Draw structured states, quantise them and route what they dequantise to.

    Args:
        model: Whose router.
        shape: Sizes of the layer.
        tokens: T.
        device: Where.
        seed: Of states and router.
        scale: Factor on the states after routing; large ones reach the clamp.
    """
    gen = torch.Generator(device=device).manual_seed(seed)
    states = structured_states(tokens, shape.hidden, gen)
    router = model.build(model.router, model.config(shape), device)
    router.weight.copy_(torch.randn(router.weight.shape, generator=gen, device=device) * shape.hidden**-0.5)
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is not None:
        bias.copy_(0.05 * torch.randn(bias.shape, generator=gen, device=device))
    _, weights, idx = router(states)
    x_q, x_sf = quantize_activations(states * scale)
    return Sample(x_q, x_sf, idx.long(), weights.float())


@torch.no_grad()
def experts_forward(
    model: Model, shape: MoEShape, data: Sample, weights: Weights, clamp: float | None = None
) -> torch.Tensor:
    """What the model's experts make of `data`, in FP32 on dequantised inputs and weights.

    Args:
        model: Whose experts.
        shape: Sizes of the layer.
        data: Inputs; slots of -1 are masked.
        weights: Quantised weights of all experts.
        clamp: Instead of the model's own bound, where it has one.

    Returns:
        float32 ``[T, H]``.
    """
    more = {} if clamp is None else {"swiglu_limit": clamp}
    experts = model.build("Experts", model.config(shape, **more), "meta")
    experts.gate_up_proj = torch.nn.Parameter(dequantize_weights(*weights.l1), requires_grad=False)
    experts.down_proj = torch.nn.Parameter(dequantize_weights(*weights.l2), requires_grad=False)
    masked = data.topk_idx < 0
    idx = data.topk_idx.masked_fill(masked, 0)  # with weight 0: not all versions skip the index `experts`
    x = dequantize_activations(data.x_q, data.x_sf)
    return experts(x, idx, data.topk_weights.masked_fill(masked, 0.0))
