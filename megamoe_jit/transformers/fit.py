"""What the plug-in relies on in transformers, asked of the release that is installed.

Every fact is a question with an answer in a sentence, so that tests, `doctor` and the plug-in itself, which steps aside
where one does not hold, say the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

NAME = "megamoe"  #: the value of `experts_implementation`
WANTED = "transformers>=5.17,<6"
TESTED = ("5.17.0", "5.24.0")

_FORWARD = ["self", "hidden_states", "top_k_index", "top_k_weights"]
_OPTIONS = ["is_concatenated", "is_transposed", "has_bias", "has_gate"]  #: of the decorator, and attributes of modules
_FP8_PARAMETERS = ["gate_up_proj", "gate_up_proj_scale_inv", "down_proj", "down_proj_scale_inv"]


def relied_upon() -> Iterator[tuple[str, str]]:
    """Each thing, by name, with how it differs from what is relied upon; empty if it does not."""
    questions: tuple[tuple[str, Callable[[], str]], ...] = (
        ("integrations.moe.ALL_EXPERTS_FUNCTIONS", lambda: _registry("moe", "ALL_EXPERTS_FUNCTIONS")),
        (
            "integrations.finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS",
            lambda: _registry("finegrained_fp8", "ALL_FP8_EXPERTS_FUNCTIONS"),
        ),
        ("integrations.moe.grouped_mm_experts_forward", _arguments),
        ("integrations.moe.use_experts_implementation", _decorator),
        ("integrations.finegrained_fp8.FP8Experts", _fp8_experts),
    )
    for name, ask in questions:
        try:
            yield name, ask()
        except Exception as error:  # whatever a release that moved raises
            yield name, f"cannot be asked: {type(error).__name__}: {error}"


def problems() -> list[str]:
    """A sentence for each thing that is not as expected."""
    return [f"{name}: {problem}" for name, problem in relied_upon() if problem]


def _integration(name: str) -> Any:
    import importlib

    return importlib.import_module(f"transformers.integrations.{name}")


def _registry(module: str, name: str) -> str:
    registry = getattr(_integration(module), name, None)
    if registry is None:
        return "is gone; implementations of experts were registered there"
    if not callable(getattr(registry, "register", None)) or not callable(getattr(registry, "get_interface", None)):
        return "has no register and get_interface any more"
    return ""


def _arguments() -> str:
    found = list(inspect.signature(_integration("moe").grouped_mm_experts_forward).parameters)
    return "" if found[:4] == _FORWARD else f"takes {found}; implementations were called with {_FORWARD}"


def _decorator() -> str:
    found = inspect.signature(_integration("moe").use_experts_implementation).parameters
    missing = [name for name in _OPTIONS if name not in found]
    return f"has no {', '.join(missing)}, which say what experts compute" if missing else ""


def _fp8_experts() -> str:
    source = inspect.getsource(_integration("finegrained_fp8").FP8Experts.__init__)
    missing = [name for name in (*_FP8_PARAMETERS, "block_size", "activation_scheme") if name not in source]
    return f"has no {', '.join(missing)}" if missing else ""
