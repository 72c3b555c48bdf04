"""`megamoe-jit shapes`: model shapes known by name."""

from __future__ import annotations

import click

from megamoe_jit._cli._io import document, emit_json, json_option, show, table
from megamoe_jit._cli._options import FullSummaries

__all__ = ["shapes"]


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

    presets = [preset(name) for name in preset_names()]
    if as_json:
        rows = [
            {
                "name": p.name,
                **p.shape.to_json(),
                "shared": p.shared,
                "ranks": p.ranks,
                "source": p.source,
                "config": p.config,
            }
            for p in presets
        ]
        emit_json(document("shapes", shapes=rows))
        return
    rows_of_text = [
        (p.name, p.shape.hidden, p.shape.intermediate, p.shape.experts, p.shape.topk, p.shared, p.ranks, p.source)
        for p in presets
    ]
    headers = ("NAME", "HIDDEN", "INTERMEDIATE", "EXPERTS", "TOPK", "SHARED", "RANKS", "SOURCE")
    show(table(headers, rows_of_text, left=(0, 7)))
