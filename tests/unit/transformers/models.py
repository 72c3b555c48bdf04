"""Tiny models of transformers, with sizes that the layer has."""

from __future__ import annotations

from typing import Any

import torch

import megamoe_jit as mm

EXPERTS, TOPK, WIDTH, VOCABULARY = 4, 2, 128, 64
STD = 0.02  #: of the experts' weights: small, so that roundings send few tokens elsewhere in the next layer
_COMMON = {
    "num_hidden_layers": 2,
    "hidden_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_experts_per_tok": TOPK,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
}
#: Configuration classes, and what each has beside the common sizes.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3MoeConfig": {"num_experts": EXPERTS, "norm_topk_prob": True},
    "MixtralConfig": {"num_local_experts": EXPERTS},
    "DeepseekV3Config": {**_LATENT, "head_dim": 16},
    "Glm4MoeConfig": {**_LATENT, "num_key_value_heads": 1},
    "MiniMaxM2Config": {"num_local_experts": EXPERTS, "rotary_dim": 32},
    "DeepseekV4Config": {
        "n_routed_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "num_key_value_heads": 1,
        "q_lora_rank": 32,
        "o_lora_rank": 32,
        "o_groups": 1,
        "qk_rope_head_dim": 16,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 8,
        "swiglu_limit": 0.1,
        "mlp_layer_types": ["moe", "moe"],
    },
}


def config(name: str, **changes: Any) -> Any:
    """A configuration of one of `MODELS`."""
    import transformers

    return getattr(transformers, name)(**{**_COMMON, **MODELS[name], **changes})


def make(name: str, implementation: str | None = None, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with random weights; those of experts are what FP8 has, so that every implementation has the same."""
    import transformers

    torch.manual_seed(3)
    more = {} if implementation is None else {"experts_implementation": implementation}
    made = transformers.AutoModelForCausalLM.from_config(config(name, **changes), dtype=dtype, **more).eval()
    for module in experts_of(made):
        for weight in (module.gate_up_proj, module.down_proj):
            torch.nn.init.normal_(weight, std=STD)
            weight.data.copy_(mm.dequantize_weights(*mm.quantize_weights(weight.data)))
    return made


def experts_of(model: torch.nn.Module) -> list[Any]:
    """Its experts modules."""
    return [module for module in model.modules() if hasattr(module, "gate_up_proj") and module.gate_up_proj.ndim == 3]


def tokens(count: int = 7, batch: int = 2) -> torch.Tensor:
    """Some of the vocabulary."""
    return torch.randint(VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(5))
