"""What a model's `config.json` says of its experts, and why some of them cannot be this layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import check_clamp
from megamoe_jit._text import shown

_SILU = ("silu", "swish")
#: Of the sizes of `MoEShape`: what models call them, the first one that is there counts.
_NAMES = {
    "hidden": ("hidden_size",),
    "intermediate": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
    "experts": ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
    "topk": ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k"),
}
_INTEGERS = ("gptq", "awq", "auto-round", "autoround", "bitsandbytes", "hqq", "aqlm", "eetq", "quanto")
_KNOWN = ("fp8", "fbgemm_fp8", "compressed-tensors", "deepseek", "megamoe", "none", "mxfp4")


def text_of(config: Mapping[str, Any]) -> str | None:
    """The name of the part on the language model, of a model that has others beside; None where it is all of it."""
    names = ("text_config", "language_config", "llm_config")
    return next((name for name in names if isinstance(config.get(name), Mapping)), None)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    name = text_of(config)
    part: Mapping[str, Any] = config if name is None else config[name]
    return part


def _number(config: Mapping[str, Any], size: str) -> int | None:
    part = _text(config)
    found = next((part[name] for name in _NAMES[size] if part.get(name) is not None), None)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def topk_of(config: Mapping[str, Any]) -> int | None:
    """Experts of a token; None where it does not say."""
    return _number(config, "topk")


def experts_of(config: Mapping[str, Any]) -> int | None:
    """Experts of a layer; None where it does not say."""
    return _number(config, "experts")


def sizes_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Those of `MoEShape`, of the routed experts.

    Raises:
        ConfigError: it does not say one of them, as that of a model without experts.
    """
    found: dict[str, int] = {}
    for size, names in _NAMES.items():
        number = _number(config, size)
        if number is None:
            lacking = f"it has no {' or '.join(names)}, or no single number"
            raise ConfigError(f"{lacking}; a layer of experts needs its {size}")
        found[size] = number
    return found


def weight_format_of(config: Mapping[str, Any]) -> str:
    """In which format a layer of this package has the experts, unless somebody asks for another: as they are stored."""
    part = _text(config)
    tables = [part, part.get("quantization_config"), config.get("quantization_config")]
    names = ("expert_dtype", "quant_method")
    said = {str(table.get(name)) for table in tables if isinstance(table, Mapping) for name in names}
    return "mxfp4" if said & {"fp4", "mxfp4"} else "fp8"


def clamp_of(config: Mapping[str, Any]) -> float | None:
    """The bound of SwiGLU; None for none.

    Raises:
        ConfigError: it is no single number, or negative, or not finite.
    """
    found = _text(config).get("swiglu_limit")
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ConfigError(f"config.json: swiglu_limit is {shown(found)}; allowed: a number, or name the clamp yourself")
    if check_clamp("config.json: swiglu_limit", found) == math.inf:
        raise ConfigError(f"config.json: swiglu_limit is {shown(found)}; allowed: 0 or a positive number, or none")
    return float(found)


def refusal(config: Mapping[str, Any]) -> str:
    """Why experts of such a model cannot be this layer, in a sentence; empty if they may."""
    part = _text(config)
    act = part.get("hidden_act", part.get("hidden_activation"))
    if act is not None and act not in _SILU:
        return f"its activation is {shown(act)}; the layer computes silu(gate) * up alone"
    for name in ("swiglu_alpha", "mlp_gate_softcap", "mlp_up_softcap"):
        if part.get(name) is not None:
            return f"its SwiGLU has {name} = {shown(part[name])}; the layer has a clamp and nothing else"
    if part.get("model_type") == "gpt_oss":
        return "gpt-oss has SwiGLU with alpha, biases and hidden size 2880; the layer has none of these"
    found = config.get("quantization_config")
    return _quantization_refusal(part.get("quantization_config") if found is None else found)


def _quantization_refusal(quantization: object) -> str:
    if quantization is None:
        return ""
    if not isinstance(quantization, Mapping):
        return f"its quantization_config is {shown(quantization)}, which is no table"
    method = str(quantization.get("quant_method", "none")).lower()
    if method in _INTEGERS:
        return f"its experts are quantised by {shown(method)} to integers; the layer reads FP8, MXFP4 or values"
    if method not in _KNOWN:
        return f"its experts are quantised by {shown(method)}, which is not known; allowed: FP8, MXFP4 or values"
    block = quantization.get("weight_block_size")
    if block is not None and list(block if isinstance(block, list | tuple) else [block]) != [128, 128]:
        return f"its FP8 has blocks of {shown(block)}; the layer reads blocks of 128 x 128"
    for group in _groups(quantization):
        weights = group.get("weights")
        if isinstance(weights, Mapping) and weights.get("type", "float") == "int":
            bits = shown(weights.get("num_bits"))
            return f"its experts are INT{bits}; the layer reads FP8, MXFP4 or values: take an FP8 release of the model"
    return ""


def _groups(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = quantization.get("config_groups")
    return [each for each in groups.values() if isinstance(each, Mapping)] if isinstance(groups, Mapping) else []
