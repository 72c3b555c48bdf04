"""All kinds of kernels: which one a symbol or a cache entry's data mean."""

from __future__ import annotations

from typing import Any

from megamoe_jit._spec.any_layer import PassSpec, StageSpec
from megamoe_jit._spec.spec import KernelSpec

AnySpec = KernelSpec | StageSpec | PassSpec
_FOR_ANY_LAYER = (StageSpec, PassSpec)


def spec_from_json(data: dict[str, Any]) -> AnySpec:
    """The specification whose `to_json` gave this; raises `ConfigError` for what is no such data."""
    for kind in _FOR_ANY_LAYER:
        if isinstance(data, dict) and kind.word in data:
            return kind.from_json(data)
    return KernelSpec.from_json(data)


def spec_of_kernel_name(name: str) -> AnySpec | None:
    """The kernel with this symbol; None if it is none's.  Raises `ConfigError` if a part is not supported."""
    found = (kind.of_kernel_name(name) for kind in _FOR_ANY_LAYER)
    return next((spec for spec in found if spec is not None), None) or KernelSpec.of_kernel_name(name)
