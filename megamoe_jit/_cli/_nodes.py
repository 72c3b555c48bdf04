"""Options of commands that ask of several nodes, and what they say of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from megamoe_jit._cli._io import human_bytes

if TYPE_CHECKING:
    from megamoe_jit._diagnose.between import Between, Ways

__all__ = ["lines_between", "nodes_option", "nodes_options", "ways_of"]

F = TypeVar("F", bound=Callable[..., Any])

nodes_option = click.option(
    "--nodes",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Nodes that share the experts, each with --ranks GPUs.",
)
_WAYS = (
    click.option(
        "--exchange",
        type=click.Choice(("auto", "gather", "exact")),
        default="auto",
        show_default=True,
        help="With several nodes: how rows travel between them.",
    ),
    click.option(
        "--partial",
        type=click.Choice(("bf16", "fp32")),
        default="bf16",
        show_default=True,
        help="With several nodes: in which they send back what they have summed.",
    ),
    click.option(
        "--chunks",
        type=click.IntRange(1, 64),
        help="With several nodes: parts of a call, of which one travels while another is computed.  "
        "[default: by the rule]",
    ),
)


def nodes_options(command: F) -> F:
    """`--nodes` and how rows travel: parameters `nodes`, `exchange`, `partial` and `chunks`."""
    for option in (*reversed(_WAYS), nodes_option):
        command = option(command)
    return command


def ways_of(nodes: int, exchange: str, partial: str, chunks: int | None) -> Ways:
    """What these options ask for."""
    from megamoe_jit._diagnose.between import Ways

    return Ways(nodes, exchange, partial, chunks)


def lines_between(it: Between) -> list[str]:
    """What is between nodes, as text."""
    return [
        f"{it.nodes} nodes: {it.exchange}, {it.partial} back, {it.chunks} chunk(s), "
        f"launches of {it.launch_rows} rows (room for {it.most_rows})",
        f"modelled, not measured: {it.total_us:.0f} us, of which exchange {it.exchange_us:.0f} and kernel "
        f"{it.kernel_us:.0f} before overlap; {human_bytes(it.sent_bytes)} to other nodes",
        *it.reasons,
    ]
