"""Which kernels are compiled at every run of the tests, and which by `make test-kernels` alone.

What breaks a kernel is a value of one property, or of two that meet: a layer's sizes in one variant, raw inputs with
shared experts.  So each pair of values that is usual is compiled once, and not each kernel that has it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence

from megamoe_jit._spec import KernelSpec, Variant

#: What `auto` takes for FP8 weights, of every preset.
ALWAYS = (Variant.PINGPONG, Variant.COOPERATIVE)

#: Odd sizes, by their top-k, that are compiled at every run for variants that take long and differ from others in how
#: weights reach the tensor cores alone: the smallest, those over two ranks, those with half a tile of 256 columns.
ODD_TOPK = {Variant.WIDE: (12, 32), Variant.UNPACK: (1, 12, 32), Variant.PREFILL: (1, 12, 32)}

Pair = tuple[tuple[str, object], tuple[str, object]]


def usual(specs: Mapping[str, KernelSpec]) -> dict[str, KernelSpec]:
    """Those whose pairs are compiled at every run: of variants that are not for all, V4 presets and odd sizes alone."""
    from megamoe_jit.heuristics import preset_names

    others = tuple(name for name in preset_names() if not name.startswith("v4"))
    return {
        name: spec
        for name, spec in specs.items()
        if spec.variant in ALWAYS or not name.removeprefix("mxfp4-").startswith(others)
        if "odd-h" not in name or spec.shape.topk in ODD_TOPK.get(spec.variant, (spec.shape.topk,))
    }


def pairs(spec: KernelSpec) -> set[Pair]:
    """Every two of the properties that its code is made from, with their values."""
    shape, numerics = spec.shape, spec.numerics
    properties = {
        "layer": (shape.hidden, shape.intermediate, shape.topk),
        "experts": shape.experts,
        "shared": shape.shared > 0,
        "ranks": spec.ranks,
        "variant": (spec.variant, spec.weights.name),
        "numerics": numerics,
        "inputs": spec.inputs,
    }
    return set(itertools.combinations(properties.items(), 2))


def all_pairs(specs: Mapping[str, KernelSpec]) -> list[str]:
    """The names of a few that have every pair of all: again and again the first of those with the most new pairs.

    Of these, whose pairs others came to have as well is left out again.
    """
    left = {name: pairs(spec) for name, spec in specs.items()}
    missing: set[Pair] = set().union(*left.values())
    found = set[str]()
    while missing:
        name = max(left, key=lambda each: len(left[each] & missing))
        found.add(name)
        missing -= left.pop(name)
    for name in [name for name in specs if name in found]:
        if pairs(specs[name]) <= set().union(*(pairs(specs[other]) for other in found - {name})):
            found.remove(name)
    return [name for name in specs if name in found]


def often(specs: Mapping[str, KernelSpec]) -> Sequence[str]:
    """The names of all, where the variable ALL_KERNELS is set; else of the few that have every usual pair."""
    names = list(specs) if os.environ.get("ALL_KERNELS") else all_pairs(usual(specs))
    assert names, "nothing is left to compile"
    return names
