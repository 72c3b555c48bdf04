"""The implementation as transformers calls it, and its place in both of the registries."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import MAX_TOPK, check_int
from megamoe_jit._spec.checks import check
from megamoe_jit.transformers.adapter import ATTRIBUTE, adapter_of, refuse_gradients, release_module
from megamoe_jit.transformers.fit import NAME, WANTED, problems


def megamoe_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward pass of an experts module.

    Args:
        self: the module.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]``; ids of the module's own experts, any other for a slot that is masked.
        top_k_weights: ``[T, K]``.

    Returns:
        ``[T, H]``, in the dtype of `hidden_states`.
    """
    refuse_gradients(hidden_states)
    adapter = getattr(self, ATTRIBUTE, None)
    slots, device = top_k_index.shape[-1], hidden_states.device
    if adapter is None or not adapter.serves(self, slots, device):
        adapter = adapter_of(self, slots, device)
    y: torch.Tensor = adapter(hidden_states, top_k_index, top_k_weights)
    return y


def register() -> bool:
    """Enter the implementation in both registries; False, with one warning, where it does not fit.

    A release that moved what the plug-in relies on stays as it is, and so does a process without transformers.
    """
    why = ""
    if find_spec("transformers") is None:
        why = f"transformers is not installed; pip install '{WANTED}'"
    elif found := problems():
        more = "`megamoe-jit doctor --engine transformers` says more"
        why = f"{'; '.join(found)}. It is written for {WANTED}; {more}"
    if why:
        warnings.warn(f"megamoe_jit.transformers steps aside: {why}", stacklevel=3)
        return False
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for registry in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS):
        registry.register(NAME, megamoe_experts_forward)
    return True


def _experts(model: torch.nn.Module) -> list[Any]:
    return [each for each in model.modules() if hasattr(each, "down_proj") and hasattr(each, "_apply_gate")]


def prepare(model: torch.nn.Module, topk: int | None = None) -> int:
    """Make the layers of a model now, and not at its first call: before it is compiled as a whole, or captured.

    Args:
        model: of transformers, whose implementation of experts is "megamoe".
        topk: experts of a token; by default as its configuration says.

    Returns:
        How many there are.

    Raises:
        ConfigError: one of them cannot be this layer, or the configuration does not say how many experts a token has.
    """
    modules = [each for each in _experts(model) if each.config._experts_implementation == NAME]
    for module in modules:
        slots = topk if topk is not None else getattr(module.config, "num_experts_per_tok", None)
        if slots is None:
            raise ConfigError("topk: the model's configuration has no num_experts_per_tok; allowed: name it")
        check_int("topk", slots)
        check(0 < slots <= MAX_TOPK, "topk", slots, f"1 to {MAX_TOPK}")
        adapter_of(module, slots, module.down_proj.device)
    return len(modules)


def release(model: torch.nn.Module) -> int:
    """Give all experts of a model their weights back, and the layers' memory; how many layers there were.

    The next call makes them again, of the weights that are there then: after a write through `data`, which a layer
    that was made of values cannot notice, this has them read anew.

    Args:
        model: of transformers.
    """
    return sum(release_module(each) for each in _experts(model))
