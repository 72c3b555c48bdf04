"""`megamoe-jit inspect-checkpoint`: what is in a checkpoint, and whether it can be used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from megamoe_jit._cli._io import ExitCode, NamedPath, cell, emit, end, json_option, say, show, table
from megamoe_jit._text import counted, human_bytes

if TYPE_CHECKING:
    from megamoe_jit.checkpoints.documents import CheckpointLayer, InspectedCheckpoint


@click.command(name="inspect-checkpoint")
@click.argument("path", type=NamedPath(path_type=Path))
@click.option("--ranks", type=click.IntRange(min=1), default=1, show_default=True, help="That share the experts.")
@click.option(
    "--experts",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Of each layer, whose exponents are read; 0 for none.",
)
@click.option("--scheme", help="How tensors are named, where the names do not tell.")
@json_option
def inspect_checkpoint(path: Path, ranks: int, experts: int, scheme: str | None, as_json: bool) -> None:
    """Show what is in a model's checkpoint, whether it can be used, what it takes; needs no GPU.

    Exit code 0 if all of its experts can be used, 1 if not.
    """
    from megamoe_jit.checkpoints import inspect

    found = inspect(path, ranks=ranks, experts=experts, scheme=scheme)
    if as_json:
        emit(found)
    else:
        _show(found)
    end(ExitCode.OK if found.usable else ExitCode.FAILED)


def _show(found: InspectedCheckpoint) -> None:
    show(f"{found.path}: {counted(found.tensors, 'tensor')} in {counted(found.files, 'file')}")
    if found.problem is not None:
        show(f"cannot be used: {found.problem}")
        return
    facts = [("model", found.model_type), ("names", found.scheme), ("top-k", found.topk), ("clamp", found.clamp)]
    show(", ".join(f"{name} {value}" for name, value in facts if value is not None))
    head = ("layer", "experts", "hidden", "intermediate", "stored as", "shared", "a rank", "exponents", "exact")
    show(table(head, [_row(layer) for layer in found.layers], left=(4, 5)))
    for layer in found.layers:
        if layer.problem is not None:
            named = layer.problem.startswith(f"layer {layer.layer}")
            show(layer.problem if named else f"layer {layer.layer}: {layer.problem}")
    where = "in all" if found.ranks == 1 else f"on each of {found.ranks} ranks"
    show(f"{human_bytes(found.bytes_per_rank)} {where}")
    if found.usable:
        call = f"MegaMoE.from_checkpoint({found.path!r}, {found.layers[0].layer}, max_tokens=4096)"
        say(f"all can be used; the experts of one layer, in Python: {call}")


def _row(layer: CheckpointLayer) -> tuple[object, ...]:
    spread = layer.spread
    shared = f"{layer.shared_experts} {layer.shared}" if layer.shared else None
    size = None if layer.bytes_per_rank is None else human_bytes(layer.bytes_per_rank)
    exponents = None if spread is None else f"{spread.least} to {spread.most}"
    exact = None if spread is None or spread.blocks is None else f"{spread.exact} of {spread.blocks}"
    sizes = (layer.experts, layer.hidden, layer.intermediate, layer.kind)
    return tuple(map(cell, (layer.layer, *sizes, shared, size, exponents, exact)))
