"""What the buffers and the launch of a rank take, without making them: no GPU, no torch, nothing compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megamoe_jit._device.layout import Section, buffer_layout
from megamoe_jit._diagnose.between import ONE_NODE, Between, Ways, between
from megamoe_jit._diagnose.explain import DEFAULT_SMS, AskedFor, Case, choice_for
from megamoe_jit._documents import Count, Document, content
from megamoe_jit._spec import BLOCK, DEFAULT_NUMERICS, FP8, MAX_TOKENS, KernelSpec, MoEShape, WeightFormat
from megamoe_jit._spec.abi import (
    BLOCK_N,
    DISPATCH_CHUNK,
    MATH_WARPS,
    SHARED_LIMIT,
    STAGING_BYTES,
    TILE_BYTES,
    TILE_SLOTS,
)
from megamoe_jit._spec.checks import check
from megamoe_jit._spec.numerics import Numerics
from megamoe_jit._spec.variants import AUTO, Variant
from megamoe_jit.heuristics.select import all_variants


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the shared memory of a block.

    Attributes:
        what: for people
    """

    name: str
    bytes: Count
    what: str


@dataclass(frozen=True, slots=True)
class Launch:
    """The launch of one kernel, and the shared memory of a block.

    Attributes:
        kernel: its symbol
        grid: blocks
        block: threads
        stages: of the pipeline of tiles
        dispatch_slots: chunks of rows in flight
    """

    kernel: str
    variant: Variant
    grid: tuple[Count, ...]
    block: tuple[Count, ...]
    stages: Count
    dispatch_slots: Count
    shared_bytes: Count
    shared_limit_bytes: Count
    shared: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Planned(Case):
    """Memory and launch of one rank whose buffer holds so many tokens.

    Attributes:
        capacity: tokens that the buffer holds
        pool_rows: rows that the pools hold
        full_call: the variant of a call that fills the buffer
        expanded_bytes: in which a variant has packed weights while a call runs; all layers of a buffer share it
        symmetric: what peers may read or write
        local: what this rank alone uses
        between: with several nodes, how rows travel; shape and buffer are those of a node then, one for each lane
    """

    capacity: Count
    pool_rows: Count
    full_call: Variant
    symmetric: tuple[Section, ...]
    local: tuple[Section, ...]
    symmetric_bytes: Count
    local_bytes: Count
    buffer_bytes: Count
    weight_bytes: Count
    expanded_bytes: Count
    output_bytes: Count
    kernels: tuple[Launch, ...]
    between: Between | None = None


@dataclass(frozen=True, slots=True)
class PlanDocument(AskedFor, Document):
    """Memory and launch of one rank."""

    KIND = "plan"

    plans: tuple[Planned, ...]


def shared_parts(spec: KernelSpec) -> tuple[Part, ...]:
    """The shared memory of a block by part, in the order of `layout/shared.cuh`; the sum is `shared_bytes`."""
    stages, slots, experts = spec.stages, spec.dispatch_slots, spec.local_experts
    pieces, scales = (stages, 8) if spec.variant.helpers else (0, 4)
    parts = [
        ("activations", stages * spec.block_m * BLOCK, f"{stages} stages of e4m3 [{spec.block_m}, {BLOCK}]"),
        (
            "weights",
            stages * spec.staged.code_bytes(BLOCK_N, BLOCK),
            f"{stages} stages of {spec.staged.what} [{BLOCK_N}, {BLOCK}]",
        ),
        ("exponents", stages * spec.staged.exponent_bytes(BLOCK_N, BLOCK), f"{stages} stages, of groups of weights"),
        (
            "packed",
            pieces * spec.weights.stream_bytes(BLOCK_N, BLOCK),
            f"{pieces} k-blocks of {spec.weights.what} with exponents, before they are unpacked",
        ),
        ("staging", MATH_WARPS * STAGING_BYTES, "2 KiB for each of the eight math warps"),
        ("dispatch", slots * DISPATCH_CHUNK, f"{slots} chunks of rows in flight"),
        ("scales", 4 * stages * (spec.block_m + scales), f"{stages} stages of f32 [{spec.block_m} + {scales}]"),
        (
            "barriers",
            stages * 16 + TILE_SLOTS * 24 + slots * 8 + pieces * 16,
            "of stages, tile slots and dispatch slots" + (", and of packed k-blocks" if pieces else ""),
        ),
        ("tile slots", TILE_SLOTS * TILE_BYTES, f"ring of {TILE_SLOTS} announced tiles"),
        ("words", 64, "words shared by the warps of a block"),
        ("expert table", 4 * experts + 8 * (experts + 1) + 2 * experts, "rows, first rows, first items, ids"),
    ]
    parts = [part for part in parts if part[1]]
    rest = spec.shared_bytes - sum(size for _, size, _ in parts)
    if rest:
        parts.append(("padding", rest, "to a multiple of 16 B"))
    return tuple(Part(*part) for part in parts)


def _launch(spec: KernelSpec, num_sms: int) -> Launch:
    return Launch(
        kernel=spec.kernel_name,
        variant=spec.variant,
        grid=(num_sms, 1, 1),
        block=(spec.threads, 1, 1),
        stages=spec.stages,
        dispatch_slots=spec.dispatch_slots,
        shared_bytes=spec.shared_bytes,
        shared_limit_bytes=SHARED_LIMIT,
        shared=shared_parts(spec),
    )


def memory_plan(
    shape: MoEShape,
    tokens: int,
    *,
    name: str = "",
    ranks: int = 1,
    variant: str = AUTO,
    num_sms: int = DEFAULT_SMS,
    gpu: str | None = None,
    weights: str = FP8.name,
    ways: Ways = ONE_NODE,
) -> Planned:
    """Memory and launch of one rank whose buffer holds so many tokens.

    Args:
        shape: sizes of the layer.
        tokens: capacity of the buffer, per rank.
        name: of the shape.
        ranks: ranks that share the experts.
        variant: one variant alone, or `auto` for every one that a call can pick.
        num_sms: blocks of the launch.
        gpu: full name of the GPU, for what was measured on it; None for none.
        weights: the format of the weights.
        ways: how calls go over several nodes, which share the experts of `shape`.

    Raises:
        ConfigError: a value is not supported.
    """
    check(1 <= tokens <= MAX_TOKENS, "tokens", tokens, f"1 to {MAX_TOKENS}")
    stored = WeightFormat.parse(weights)
    numerics, room, beyond = DEFAULT_NUMERICS, tokens, None
    if ways.nodes > 1:
        shape, beyond = between(shape, tokens, ranks, ways, stored)
        room, numerics = beyond.most_rows, Numerics(float32_out=beyond.partial == "fp32")
    layout = buffer_layout(shape, room, ranks)
    full = Case(name, shape, ranks, layout.capacity if beyond is None else tokens, weights)
    picked = choice_for(full, None if variant == AUTO else variant, num_sms, gpu)
    limits = {"ranks": ranks, "most": layout.capacity}
    variants = all_variants(shape, stored, **limits) if variant == AUTO else (picked.variant,)
    specs = [KernelSpec(shape, each, ranks, numerics=numerics, weights=stored) for each in variants]
    return Planned(
        **content(replace(full, tokens=tokens)),
        capacity=layout.capacity,
        pool_rows=layout.pool_rows,
        full_call=picked.variant,
        symmetric=layout.symmetric,
        local=layout.local,
        symmetric_bytes=layout.symmetric_bytes,
        local_bytes=layout.local_bytes,
        buffer_bytes=layout.total_bytes,
        weight_bytes=stored.expert_bytes(shape.hidden, shape.intermediate) * specs[0].local_experts,
        expanded_bytes=max(spec.expanded_bytes for spec in specs),
        output_bytes=tokens * shape.hidden * 2,
        kernels=tuple(_launch(spec, num_sms) for spec in specs),
        between=beyond,
    )
