"""`megamoe-jit shapes`, and the options with which other commands name shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from megamoe_jit._cli._io import document, emit_json, json_option, table

if TYPE_CHECKING:
    from megamoe_jit._spec import MoEShape

__all__ = ["named_shapes", "shape_options", "shapes"]

_F = TypeVar("_F", bound=Callable[..., Any])
_SIZES = ("hidden", "intermediate", "experts", "topk")


def shape_options(command: _F) -> _F:
    """Add `--shapes` and, as the alternative to it, the four sizes of one layer."""
    for option in reversed(
        (
            click.option(
                "--shapes",
                "names",
                metavar="NAME[,NAME...]",
                help="Shapes by name (see `shapes ls`), `all`, or .toml files laid out like presets.toml.",
            ),
            click.option("--hidden", type=int, help="Hidden size, instead of --shapes."),
            click.option("--intermediate", type=int, help="Intermediate size of one expert."),
            click.option("--experts", type=int, help="Number of experts, those of all ranks together."),
            click.option("--topk", type=int, help="Experts per token."),
        )
    ):
        command = option(command)
    return command


def named_shapes(names: str | None, **sizes: int | None) -> dict[str, MoEShape]:
    """The layers a command line asks for, by the name to show them under."""
    from megamoe_jit._spec import MoEShape
    from megamoe_jit.heuristics.presets import parse_shapes

    given = [f"--{size}" for size in _SIZES if sizes[size] is not None]
    if names is not None:
        if given:
            raise click.UsageError(f"--shapes and {given[0]} exclude each other.")
        return {p.name: p.shape for p in parse_shapes(names)}
    if len(given) != len(_SIZES):
        raise click.UsageError("Name the shapes: --shapes NAME, or all of --hidden --intermediate --experts --topk.")
    shape = MoEShape(**{size: int(sizes[size] or 0) for size in _SIZES})
    return {f"{shape.hidden}/{shape.intermediate}/{shape.experts}/{shape.topk}": shape}


@click.group()
def shapes() -> None:
    """Model shapes known by name."""


@shapes.command("ls")
@json_option
def ls(as_json: bool) -> None:
    """List the shapes that --shapes takes."""
    from megamoe_jit.heuristics.presets import preset, preset_names

    presets = [preset(name) for name in preset_names()]
    if as_json:
        rows = [
            {"name": p.name, **asdict(p.shape), "ranks": p.ranks, "source": p.source, "config": p.config}
            for p in presets
        ]
        emit_json(document("shapes", shapes=rows))
        return
    click.echo(
        table(
            ("NAME", "HIDDEN", "INTERMEDIATE", "EXPERTS", "TOPK", "RANKS", "SOURCE"),
            [
                (
                    p.name,
                    p.shape.hidden,
                    p.shape.intermediate,
                    p.shape.experts,
                    p.shape.topk,
                    p.ranks,
                    p.source,
                )
                for p in presets
            ],
            left=(0, 6),
        )
    )
