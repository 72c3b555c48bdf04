"""Options of commands that ask of several nodes, and what they say of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._options import gathered, per_shape
from megamoe_jit._text import counted, human_bytes

if TYPE_CHECKING:
    from megamoe_jit._diagnose.between import Between, Ways
    from megamoe_jit._spec import MoEShape

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


def _ways(**given: Any) -> Ways:
    from megamoe_jit._diagnose.between import Ways

    return Ways(**given)


#: `--nodes` and how rows travel; the command gets them as one value, `ways`.
nodes_options = gathered((nodes_option, *_WAYS), "ways", _ways, ("nodes", "exchange", "partial", "chunks"))


def shapes_of_a_node(shapes: Mapping[str, MoEShape], nodes: int, ranks: int) -> dict[str, MoEShape]:
    """What the kernels of a node are compiled for: its part of the routed experts, alone.

    Raises:
        ConfigError: the ranks of all nodes do not share the experts evenly; says of which shape.
    """
    if nodes == 1:
        return dict(shapes)
    from megamoe_jit._diagnose.between import shape_of_a_node

    parts = per_shape(shapes, lambda _, shape: [shape_of_a_node(shape, nodes, ranks)])
    return dict(zip(shapes, parts, strict=True))


def lines_between(it: Between) -> list[str]:
    """What is between nodes, as text."""
    return [
        f"{it.nodes} nodes: {it.exchange}, {it.partial} back, {counted(it.chunks, 'chunk')}, "
        f"launches of {it.launch_rows} rows (room for {it.most_rows})",
        f"modelled, not measured: {it.total_us:.0f} us, of which exchange {it.exchange_us:.0f} and kernel "
        f"{it.kernel_us:.0f} before overlap; {human_bytes(it.sent_bytes)} to other nodes",
        *it.reasons,
    ]
