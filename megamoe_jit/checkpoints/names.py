"""How models call the tensors of their experts: the schemes, and what a checkpoint has by one of them.

A scheme is found by the names alone. Names end as `layers.L.BLOCK.experts.E.PART.KIND`, behind whatever the model puts
in front; or `layers.L.BLOCK.experts.PART` where all experts are one tensor.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from megamoe_jit._errors import ConfigError
from megamoe_jit._text import shown

#: Parts of an expert, as this package calls them: rows of the gate, of up, and down.
Parts = dict[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way of naming.

    Attributes:
        name: for people and arguments.
        block: what holds the experts of a layer.
        gate, up, down: the parts of an expert.
        scale: the last word of the name of a weight's scales, where they are written; any known one is read.
    """

    name: str
    block: str
    gate: str
    up: str
    down: str
    scale: str


SCHEMES = {
    each.name: each
    for each in (
        # DeepSeek-V3 and R1, GLM-4.5 to GLM-5, Kimi-K2, MiMo-V2.5, Qwen3-MoE, Qwen3.5-MoE
        Scheme("deepseek-v3", "mlp", "gate_proj", "up_proj", "down_proj", "weight_scale_inv"),
        Scheme("deepseek-v4", "ffn", "w1", "w3", "w2", "scale"),  # and V4.1
        Scheme("mixtral", "block_sparse_moe", "w1", "w3", "w2", "weight_scale_inv"),  # and MiniMax-M2
    )
}
FUSED = "fused"  #: all experts of a layer in one tensor, as transformers has them in memory
MEGAMOE = "megamoe"  #: written by `convert`: all experts of a layer, in the kernel's order

_SCALES = ("weight_scale_inv", "weight_scale", "scale")  #: last words that mean what a code is multiplied with
_HEAD = r"(?P<prefix>(?:.*\.)?)layers\.(?P<layer>\d{1,6})\.(?P<block>mlp|ffn|block_sparse_moe)\."
_EXPERT = re.compile(_HEAD + r"experts\.(?P<expert>\d{1,6})\.(?P<part>\w+)\.(?P<kind>\w+)", re.ASCII | re.DOTALL)
_SHARED = re.compile(_HEAD + r"shared_experts?\.(?P<part>\w+)\.(?P<kind>\w+)", re.ASCII | re.DOTALL)
_WHOLE = re.compile(
    _HEAD + r"experts\.(?P<part>gate_up_proj|down_proj|w13|w2)(?P<kind>(?:_\w+)?)", re.ASCII | re.DOTALL
)


@dataclass(slots=True)
class LayerNames:
    """Names of the tensors of one layer.

    Attributes:
        experts: by expert, part (gate, up, down) and kind (weight, scale, or the last word of the name).
        shared: of the shared expert, by part and kind.
        whole: by part (gate_up, down, or w13 and w2 of `megamoe`) and kind, where all experts are one tensor.
    """

    experts: dict[int, Parts] = field(default_factory=dict)
    shared: Parts = field(default_factory=dict)
    whole: Parts = field(default_factory=dict)


@dataclass(slots=True)
class ModelNames:
    """What a checkpoint has: its scheme, by name, and the layers with experts, by number."""

    scheme: str
    prefix: str
    layers: dict[int, LayerNames]


def all_names_of(names: Iterable[str], scheme: str | None = None) -> list[ModelNames]:
    """Find all experts among a checkpoint's names.

    Beside the model there may be layers that predict further tokens, under another prefix: they are fewer, and come
    behind it.

    Args:
        names: of all tensors.
        scheme: one of `SCHEMES`, "fused" or "megamoe"; None to find it.

    Raises:
        ConfigError: there are no experts by this scheme, or by any.
    """
    known = [*SCHEMES, FUSED, MEGAMOE]
    if scheme is not None and (not isinstance(scheme, str) or scheme not in known):
        raise ConfigError(f"unknown scheme of names {shown(scheme)}; allowed: {', '.join(known)}")
    found = _sorted(tuple(names))
    fitting = {key: layers for key, layers in found.items() if scheme in (None, key[0]) and _has_experts(layers)}
    if not fitting:
        wanted = f"scheme {scheme}" if scheme else f"any scheme ({', '.join(known)})"
        others = ", ".join(sorted({key[0] for key, layers in found.items() if _has_experts(layers)}))
        raise ConfigError(
            f"no experts by the names of {wanted}{f'; there are some by {others}' if others else ''}; "
            "allowed: names that end as layers.0.mlp.experts.0.gate_proj.weight"
        )
    found_models = []
    for key in sorted(fitting, key=lambda key: -len(fitting[key])):
        layers = {number: layer for number, layer in fitting[key].items() if layer.experts or layer.whole}
        found_models.append(ModelNames(*key, dict(sorted(layers.items()))))
    return found_models


@functools.lru_cache(maxsize=1)
def _sorted(names: tuple[str, ...]) -> dict[tuple[str, str], dict[int, LayerNames]]:
    """Names by scheme, prefix and layer, not to be written: who loads the layers of a model asks for each of them."""
    found: dict[tuple[str, str], dict[int, LayerNames]] = {}
    for name in names:
        _take(name, found)
    return found


def _has_experts(layers: dict[int, LayerNames]) -> bool:
    return any(layer.experts or layer.whole for layer in layers.values())


def _take(name: str, found: dict[tuple[str, str], dict[int, LayerNames]]) -> None:
    if match := _EXPERT.fullmatch(name) or _SHARED.fullmatch(name):
        expert = match.groupdict().get("expert")
        for scheme in SCHEMES.values():
            part = {scheme.gate: "gate", scheme.up: "up", scheme.down: "down"}.get(match["part"])
            if part is None or match["block"] != scheme.block:
                continue
            layer = _layer(found, scheme.name, match)
            parts = layer.shared if expert is None else layer.experts.setdefault(int(expert), {})
            parts.setdefault(part, {})["scale" if match["kind"] in _SCALES else match["kind"]] = name
            if expert is None:  # beside experts in one tensor, too
                for whole in (FUSED, MEGAMOE) if scheme.block == "mlp" else (MEGAMOE,):
                    _layer(found, whole, match).shared = parts
    elif match := _WHOLE.fullmatch(name):
        scheme_name = MEGAMOE if match["part"] in ("w13", "w2") else FUSED
        word = match["kind"].lstrip("_")
        kind = "weight" if not word else "scale" if word in ("scale_inv", "scale", "scales") else word
        part = match["part"].removesuffix("_proj")
        _layer(found, scheme_name, match).whole.setdefault(part, {})[kind] = name


def _layer(found: dict[tuple[str, str], dict[int, LayerNames]], scheme: str, match: re.Match[str]) -> LayerNames:
    return found.setdefault((scheme, match["prefix"]), {}).setdefault(int(match["layer"]), LayerNames())
