"""All kinds of kernels: which one a symbol or a cache entry's data mean."""

from __future__ import annotations

from typing import Any

from megamoe_jit._spec.spec import KernelSpec
from megamoe_jit._spec.stage import StageSpec

__all__ = ["spec_from_json", "spec_of_kernel_name"]


def spec_from_json(data: dict[str, Any]) -> KernelSpec | StageSpec:
    """The specification whose `to_json` gave this; raises `ConfigError` for what is no such data."""
    if isinstance(data, dict) and "stage" in data:
        return StageSpec.from_json(data)
    return KernelSpec.from_json(data)


def spec_of_kernel_name(name: str) -> KernelSpec | StageSpec | None:
    """The kernel with this symbol; None if it is none's.  Raises `ConfigError` if a part is not supported."""
    return StageSpec.of_kernel_name(name) or KernelSpec.of_kernel_name(name)
