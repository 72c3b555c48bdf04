"""`megamoe-jit shapes`: model shapes known by name."""

from __future__ import annotations

from dataclasses import dataclass, fields

import click

from megamoe_jit._cli._io import FullSummaries, emit, json_option, show, table
from megamoe_jit._documents import Count, Document


@dataclass(frozen=True, slots=True)
class NamedShape:
    """A shape that is known by name.

    Attributes:
        experts: of all ranks
        shared: experts that every token goes to beside
        ranks: GPUs that the experts are usually spread over
        config: configuration class in transformers
    """

    name: str
    hidden: Count
    intermediate: Count
    experts: Count
    topk: Count
    shared: Count
    ranks: Count
    source: str
    config: str | None


@dataclass(frozen=True, slots=True)
class Shapes(Document):
    """The shapes known by name."""

    KIND = "shapes"

    shapes: tuple[NamedShape, ...]


@click.group(cls=FullSummaries)
def shapes() -> None:
    """Model shapes known by name."""


@shapes.command("ls")
@json_option
def ls(as_json: bool) -> None:
    """List the shapes that --shapes takes.

    SHARED is how many shared experts a model has, for --shared.
    RANKS is over how many GPUs a model's experts are usually spread; `bench` and `tune` time one such share.
    """
    from megamoe_jit.heuristics.presets import preset, preset_names

    rows = tuple(
        NamedShape(p.name, s.hidden, s.intermediate, s.experts, s.topk, p.shared, p.ranks, p.source, p.config)
        for p in map(preset, preset_names())
        for s in (p.shape,)
    )
    if as_json:
        emit(Shapes(rows))
        return
    shown = [field.name for field in fields(NamedShape)][:-1]
    cells = [[getattr(row, name) for name in shown] for row in rows]
    show(table([name.upper() for name in shown], cells, left=(0, 7)))
