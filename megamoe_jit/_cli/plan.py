"""`megamoe-jit plan`: the memory and the launch of one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._io import emit, json_option, show, table
from megamoe_jit._cli._nodes import lines_between, nodes_options
from megamoe_jit._cli._options import (
    gpu_option,
    per_shape,
    ranks_option,
    shape_options,
    sms_option,
    tokens_option,
    variant_option,
    weight_format_option,
)
from megamoe_jit._text import counted, human_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megamoe_jit._device.layout import Section
    from megamoe_jit._diagnose.plan import Part, Planned
    from megamoe_jit._spec import MoEShape


def _sections(title: str, sections: Sequence[Section | Part], total: int) -> str:
    rows = [(s.name, s.bytes, human_bytes(s.bytes), s.what) for s in sections]
    rows.append(("total", total, human_bytes(total), "with alignment" if hasattr(sections[0], "offset") else ""))
    return table((title, "BYTES", "", "WHAT"), rows, left=(0, 3))


def _text(plan: Planned) -> str:
    from megamoe_jit._device.layout import CAPACITY_STEP
    from megamoe_jit._diagnose.plan import Part

    lanes = 1 if plan.between is None else min(plan.between.chunks, 2)
    totals = [
        Part("buffer", lanes * plan.buffer_bytes, "symmetric and local" + (", two of them" if lanes > 1 else "")),
        Part("weight", plan.weight_bytes, f"{plan.weights}, this rank's experts"),
        Part("output", plan.output_bytes, "bf16 y"),
    ]
    if plan.expanded_bytes:
        whose = "for two buffers" if lanes > 1 else "shared by the layers of a buffer"
        totals.insert(2, Part("expanded", lanes * plan.expanded_bytes, f"weights as prefill expands them, {whose}"))
    if plan.between is not None:
        totals.insert(1, Part("between", plan.between.staging_bytes, "this rank's tokens, results under way"))
    capacity = f"{plan.capacity} tokens"
    if plan.between is not None:
        capacity = f"{plan.tokens} tokens of each rank, a buffer of {plan.capacity} rows for each chunk under way"
    elif plan.capacity != plan.tokens:
        capacity += f" ({plan.tokens} rounded up to a multiple of {CAPACITY_STEP})"
    blocks = [
        f"{plan.name}, up to {capacity}, {counted(plan.ranks, 'rank')}, {plan.pool_rows} pool rows; "
        f"a call that fills it takes {plan.full_call}",
        *(["\n".join(lines_between(plan.between))] if plan.between is not None else []),
        _sections("SYMMETRIC", plan.symmetric, plan.symmetric_bytes),
        _sections("LOCAL", plan.local, plan.local_bytes),
        _sections("DEVICE MEMORY", totals, sum(part.bytes for part in totals)),
    ]
    for kernel in plan.kernels:
        blocks.append(
            f"{kernel.kernel}\n"
            f"grid {kernel.grid[0]} blocks of {kernel.block[0]} threads, {kernel.stages} stages, "
            f"{kernel.shared_bytes} of {kernel.shared_limit_bytes} B of shared memory"
        )
        blocks.append(_sections("SHARED", kernel.shared, kernel.shared_bytes))
    return "\n\n".join(blocks)


@click.command()
@shape_options
@tokens_option("Most tokens of one rank in a call; the capacity of the buffer is the next multiple of 128.", least=1)
@ranks_option
@nodes_options
@variant_option("Show the kernel of one alone.")
@weight_format_option("The format of the weights.")
@sms_option
@gpu_option
@json_option
def plan(
    shapes: dict[str, MoEShape],
    tokens: tuple[int, ...],
    gpu: str | None,
    as_json: bool,
    **call: Any,
) -> None:
    """Show the device memory of one rank by section, the shared memory by part, and the launch; needs no GPU."""
    from megamoe_jit._diagnose.explain import gpu_asked_for
    from megamoe_jit._diagnose.plan import PlanDocument, memory_plan
    from megamoe_jit._settings.settings import get_settings

    get_settings()  # one that is not allowed has nothing to do with a shape
    found = gpu_asked_for(gpu)
    options = {"gpu": found.gpu, **call}
    plans = per_shape(shapes, lambda name, shape: [memory_plan(shape, count, name=name, **options) for count in tokens])
    if as_json:
        emit(PlanDocument(found.gpu, found.measured, tuple(plans)))
    else:
        show("\n\n".join(map(_text, plans)))
