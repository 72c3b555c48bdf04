"""Which kernels are compiled at every run of the tests, and which by `make test-kernels` alone."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megamoe_jit._spec import KernelSpec, Variant

__all__ = ["often"]

#: What `auto` takes for FP8 weights, of every preset.
ALWAYS = (Variant.PINGPONG, Variant.COOPERATIVE)


def often(specs: Mapping[str, KernelSpec]) -> list[str]:
    """The names of all, where the variable ALL_KERNELS is set; else of other variants the V4 presets alone."""
    from megamoe_jit.heuristics import preset_names

    others = tuple(name for name in preset_names() if not name.startswith("v4"))
    every = bool(os.environ.get("ALL_KERNELS"))
    names = [
        name
        for name, spec in specs.items()
        if every or spec.variant in ALWAYS or not name.removeprefix("mxfp4-").startswith(others)
    ]
    assert names, "nothing is left to compile"
    return names
