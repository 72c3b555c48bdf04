"""What a user types for kernels: the beginning of a key, a kernel's name, or SHAPE/VARIANT."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from megamoe_jit._errors import ConfigError

if TYPE_CHECKING:
    from megamoe_jit._spec.kinds import AnySpec

_KEY = re.compile(r"[0-9a-f]{1,64}", re.IGNORECASE)


def looks_like_key(text: str) -> bool:
    """Whether a KEY|SPEC argument is (the beginning of) a cache key."""
    return bool(_KEY.fullmatch(text))


def parse_spec(text: str, keys: bool = True) -> AnySpec:
    """The kernel named on a command line.

    Args:
        text: A kernel's symbol, as the listings show it, or `SHAPE/VARIANT[/rRANKS][/exact][/raw][/mxfp4]` with a shape
            known by name, such as `v4-flash/pingpong` or `v4-pro/cooperative/r8`.
        keys: Whether the command takes keys too; then an error names them.

    Raises:
        ConfigError: It is neither, or a part of it is not supported.
    """
    from megamoe_jit._spec import FORMATS, FP8, MAX_RANKS, KernelSpec, Numerics, Variant
    from megamoe_jit._spec.inputs import Inputs
    from megamoe_jit._spec.kinds import spec_of_kernel_name
    from megamoe_jit.heuristics.presets import preset

    if named := spec_of_kernel_name(text):
        return named
    name, *rest = text.split("/")
    file = text.endswith(".toml") or ".toml/" in text
    if file or not rest:
        problem = "names a .toml file, which only --shapes takes" if file else "names no kernel"
        name = "a kernel's name as `warmup` and `cache ls` show it"
        others = f"{name}, or the beginning of a key that `cache ls` lists" if keys else f"or {name}"
        raise ConfigError(
            f"{text!r} {problem}; allowed: SHAPE/VARIANT with a shape of `shapes ls` (v4-flash/pingpong, "
            f"v4-pro/cooperative/r8), {others}"
        )
    shape = preset(name).shape
    ranks = 1
    seen: set[str] = set()
    words, raw = Numerics.changes(), Inputs.RAW.value
    formats = [name for name in FORMATS if name != FP8.name]
    for part in rest[1:]:
        kind = "ranks" if re.fullmatch(r"r\d+", part) else "format" if part in formats else part
        if kind not in ("ranks", *words, raw, "format") or kind in seen:
            allowed = f"r1 to r{MAX_RANKS}, {', '.join([*words, raw, *formats])}, each once"
            raise ConfigError(f"{part!r} in {text!r} is not understood; allowed: {allowed}")
        seen.add(kind)
        if kind == "ranks":
            ranks = int(part[1:])
    weights = next((FORMATS[part] for part in rest[1:] if part in formats), FP8)
    numerics, inputs = Numerics.named(seen - {"ranks", raw, "format"}), Inputs.RAW if raw in seen else Inputs.STAGED
    return KernelSpec(shape, Variant.parse(rest[0]), ranks, numerics=numerics, weights=weights, inputs=inputs)
