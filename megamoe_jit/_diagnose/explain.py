"""What a call would do and what it would take, without doing it: no GPU, no torch, nothing compiled."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megamoe_jit._device.layout import Section, buffer_layout
from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import BLOCK, DEFAULT_NUMERICS, MAX_TOKENS, KernelSpec, MoEShape
from megamoe_jit._spec.abi import (
    BLOCK_N,
    DISPATCH_CHUNK,
    MATH_WARPS,
    SHARED_LIMIT,
    STAGING_BYTES,
    THREADS,
    TILE_BYTES,
    TILE_SLOTS,
)
from megamoe_jit._spec.compilable import Compilable
from megamoe_jit._spec.numerics import Numerics
from megamoe_jit.heuristics.select import AUTO, all_variants, choose
from megamoe_jit.heuristics.tables import find_gpu, table_for

__all__ = ["DEFAULT_SMS", "explain", "gpu_asked_for", "kernel_state", "memory_plan", "shared_parts"]

DEFAULT_SMS = 132  #: streaming multiprocessors of an H100 SXM and of an H200


def gpu_asked_for(name: str | None) -> dict[str, Any]:
    """The GPU whose measurements are to be used.

    Args:
        name: full or short name of one that was measured, or `none`; this machine's first GPU if None.

    Returns:
        `gpu`, its full name or None, and `measured`, whether there is a table of it.

    Raises:
        ConfigError: nothing was measured on a GPU of this name.
    """
    gpu: str | None = None
    if name is None:
        from megamoe_jit._diagnose.machine import gpus

        gpu = next((each.name for each in gpus().gpus), None)
    elif name.lower() != "none":
        gpu = find_gpu(name)
    return {"gpu": gpu, "measured": table_for(gpu) is not None}


def kernel_state(spec: Compilable) -> dict[str, Any]:
    """The key of a kernel and where it is cached, found as a call would find it, but not loaded.

    Returns:
        `kernel`, `key`, `cached`, `path` of the entry, and the `problem` if there is no compiler to give it a key.
    """
    from megamoe_jit._jit.lookup import Fit, Wanted, lookup

    wanted = Wanted.of(spec)
    found = next((at for at in lookup(wanted, least=Fit.LOADS) if at.cache.usable(at.key, spec.kernel_name)), None)
    return {
        "kernel": spec.kernel_name,
        "key": found.key if found else wanted.key,
        "cached": found is not None,
        "path": str(found.path) if found else None,
        "problem": str(wanted.problem) if wanted.problem and not found else None,
    }


def explain(
    shape: MoEShape,
    tokens: int,
    *,
    ranks: int = 1,
    variant: str | None = None,
    numerics: Numerics = DEFAULT_NUMERICS,
    num_sms: int = DEFAULT_SMS,
    gpu: str | None = None,
) -> dict[str, Any]:
    """Which kernel a call with so many tokens takes, with which parameters, and why.

    Args:
        shape: sizes of the layer.
        tokens: tokens of one rank.
        ranks: ranks that share the experts.
        variant: the `variant` of the call; the settings' one if None.
        numerics: the numeric options of the call.
        num_sms: blocks of the launch.
        gpu: full name of the GPU, for what was measured on it; None for none.

    Raises:
        ConfigError: a value is not supported.
    """
    from megamoe_jit._settings.settings import get_settings

    settings = get_settings()
    choice = choose(
        shape,
        tokens,
        ranks=ranks,
        variant=variant or settings.variant,
        cooperative_threshold=settings.cooperative_threshold,
        num_sms=num_sms,
        gpu=gpu,
    )
    spec = KernelSpec(shape, choice.variant, ranks, numerics=numerics)
    return {
        "shape": asdict(shape),
        "ranks": ranks,
        "tokens": tokens,
        "variant": choice.variant.value,
        "parameters": {
            "blocks": num_sms,
            "block_m": spec.block_m,
            "stages": spec.stages,
            "lag_tiles": choice.lag_tiles,
            "rows_per_item": choice.rows_per_item,
        },
        "reasons": list(choice.reasons),
        **kernel_state(spec),
    }


def shared_parts(spec: KernelSpec) -> list[dict[str, Any]]:
    """The shared memory of a block by part, in the order of `layout/shared.cuh`; the sum is `shared_bytes`."""
    stages, slots, experts = spec.stages, spec.dispatch_slots, spec.local_experts
    parts = [
        ("activations", stages * spec.block_m * BLOCK, f"{stages} stages of e4m3 [{spec.block_m}, {BLOCK}]"),
        ("weights", stages * spec.weight_stage_bytes, f"{stages} stages of {spec.weights.what} [{BLOCK_N}, {BLOCK}]"),
        ("staging", MATH_WARPS * STAGING_BYTES, "2 KiB for each of the eight math warps"),
        ("dispatch", slots * DISPATCH_CHUNK, f"{slots} chunks of rows in flight"),
        ("scales", stages * (spec.block_m * 4 + 16), f"{stages} stages of f32 [{spec.block_m} + 4]"),
        ("barriers", stages * 16 + TILE_SLOTS * 24 + slots * 8, "of stages, tile slots and dispatch slots"),
        ("tile slots", TILE_SLOTS * TILE_BYTES, f"ring of {TILE_SLOTS} announced tiles"),
        ("words", 64, "words shared by the warps of a block"),
        ("expert table", 4 * experts + 8 * (experts + 1) + 2 * experts, "rows, first rows, first items, ids"),
        ("source table", spec.source_table_bytes, "which pairs of each rank name each expert"),
    ]
    parts = [part for part in parts if part[1]]
    rest = spec.shared_bytes - sum(size for _, size, _ in parts)
    if rest:
        parts.append(("padding", rest, "to a multiple of 16 B"))
    return [{"name": name, "bytes": size, "what": what} for name, size, what in parts]


def _sections(sections: tuple[Section, ...]) -> list[dict[str, Any]]:
    return [asdict(section) for section in sections]


def memory_plan(
    shape: MoEShape,
    tokens: int,
    *,
    ranks: int = 1,
    variant: str = AUTO,
    num_sms: int = DEFAULT_SMS,
    gpu: str | None = None,
) -> dict[str, Any]:
    """Memory and launch of one rank whose buffer holds so many tokens.

    Args:
        shape: sizes of the layer.
        tokens: capacity of the buffer, per rank.
        ranks: ranks that share the experts.
        variant: one variant alone, or `auto` for every one that a call can pick.
        num_sms: blocks of the launch.
        gpu: full name of the GPU, for what was measured on it; None for none.

    Raises:
        ConfigError: a value is not supported.
    """
    if not 1 <= tokens <= MAX_TOKENS:
        raise ConfigError(f"tokens = {tokens} is not supported; allowed: 1 to {MAX_TOKENS}")
    from megamoe_jit._settings.settings import get_settings

    settings = get_settings()
    layout = buffer_layout(shape, tokens, ranks)
    picked = choose(
        shape,
        layout.capacity,
        ranks=ranks,
        variant=settings.variant if variant == AUTO else variant,
        cooperative_threshold=settings.cooperative_threshold,
        num_sms=num_sms,
        gpu=gpu,
    )
    variants = all_variants(shape) if variant == AUTO else (picked.variant,)
    specs = [KernelSpec(shape, each, ranks) for each in variants]
    return {
        "shape": asdict(shape),
        "ranks": ranks,
        "tokens": tokens,
        "capacity": layout.capacity,
        "pool_rows": layout.pool_rows,
        "full_call": picked.variant.value,
        "symmetric": _sections(layout.symmetric),
        "local": _sections(layout.local),
        "symmetric_bytes": layout.symmetric_bytes,
        "local_bytes": layout.local_bytes,
        "buffer_bytes": layout.total_bytes,
        "weight_bytes": specs[0].weights.expert_bytes(shape.hidden, shape.intermediate) * specs[0].local_experts,
        "output_bytes": tokens * shape.hidden * 2,
        "kernels": [
            {
                "kernel": spec.kernel_name,
                "variant": spec.variant.value,
                "grid": [num_sms, 1, 1],
                "block": [THREADS, 1, 1],
                "stages": spec.stages,
                "dispatch_slots": spec.dispatch_slots,
                "shared_bytes": spec.shared_bytes,
                "shared_limit_bytes": SHARED_LIMIT,
                "shared": shared_parts(spec),
            }
            for spec in specs
        ],
    }
