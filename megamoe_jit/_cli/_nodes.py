"""Options of commands that ask of several nodes, and what they say of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._io import ExitCode, emit, human_bytes, progress_line, say, show, table
from megamoe_jit._cli._options import per_shape
from megamoe_jit._documents import plain
from megamoe_jit._errors import ConfigError
from megamoe_jit._spec.formats import FP8

if TYPE_CHECKING:
    from megamoe_jit._bench.documents_nodes import NodesRow
    from megamoe_jit._diagnose.between import Between, Ways
    from megamoe_jit._spec import MoEShape

__all__ = [
    "bench_nodes",
    "lines_between",
    "nodes_option",
    "nodes_options",
    "refuse_with_nodes",
    "shapes_of_a_node",
]

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


def nodes_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--nodes` and how rows travel; the command gets them as one value, `ways`."""

    @functools.wraps(command)
    def with_ways(*, nodes: int, exchange: str, partial: str, chunks: int | None, **others: Any) -> Any:
        from megamoe_jit._diagnose.between import Ways

        return command(ways=Ways(nodes, exchange, partial, chunks), **others)

    for option in (*reversed(_WAYS), nodes_option):
        with_ways = option(with_ways)
    return with_ways


def shapes_of_a_node(shapes: Mapping[str, MoEShape], nodes: int, ranks: int) -> dict[str, MoEShape]:
    """What the kernels of a node are compiled for: its part of the routed experts, alone.

    Raises:
        ConfigError: the ranks of all nodes do not share the experts evenly; says of which shape.
    """
    if nodes == 1:
        return dict(shapes)

    def part(shape: MoEShape) -> MoEShape:
        if shape.experts % (nodes * ranks):
            raise ConfigError(f"{shape.experts} experts on {nodes} nodes of {ranks} ranks; allowed: evenly")
        return replace(shape, experts=shape.experts // nodes, shared=0)

    return dict(zip(shapes, per_shape(shapes, lambda _, shape: [part(shape)]), strict=True))


def lines_between(it: Between) -> list[str]:
    """What is between nodes, as text."""
    return [
        f"{it.nodes} nodes: {it.exchange}, {it.partial} back, {it.chunks} chunk(s), "
        f"launches of {it.launch_rows} rows (room for {it.most_rows})",
        f"modelled, not measured: {it.total_us:.0f} us, of which exchange {it.exchange_us:.0f} and kernel "
        f"{it.kernel_us:.0f} before overlap; {human_bytes(it.sent_bytes)} to other nodes",
        *it.reasons,
    ]


_HEADERS = ("SHAPE", "TOKENS", "NODES", "EXCHANGE", "CHUNKS", "WHOLE us", "KERNEL us", "EXCHANGE us", "REST us")
_MORE = ("MODELLED us", "UNFUSED us", "TIMES FASTER", "DIFF")
DEFAULT_TOKENS = (64, 512, 4096)


def refuse_with_nodes(picture: Path | None, variants: Sequence[str]) -> None:
    """Refuse options of `bench` that mean nothing with several nodes."""
    for given, name in ((picture, "--plot"), (variants, "--variant")):
        if given:
            raise click.UsageError(f"{name} is not for --nodes.")


def bench_nodes(
    ways: Ways,
    output: Path | None,
    as_json: bool,
    *,
    names: str,
    tokens: Sequence[int] | None,
    ranks: int | None,
    baseline: bool | None,
    weights: str,
) -> None:
    """`bench` over several nodes.

    Raises:
        click.exceptions.Exit: an output is wrong.
    """
    from megamoe_jit._device.driver import refuse_without_gpu
    from megamoe_jit.heuristics.presets import parse_shapes

    presets, counts = parse_shapes(names), tokens or DEFAULT_TOKENS
    refuse_without_gpu()
    from megamoe_jit._bench import conditions as _bench_report
    from megamoe_jit._bench.documents import Bench
    from megamoe_jit._bench.documents_nodes import NodesRow
    from megamoe_jit._bench.measure_nodes import run

    with progress_line("bench", len(presets) * len(counts)) as step:
        found = run(
            presets,
            counts,
            ways.nodes,
            ranks or 1,
            {"exchange": ways.exchange, "partial": ways.partial, "chunks": ways.chunks or "auto"},
            baseline=baseline is not False,
            weights=weights,
            progress=lambda r: step(f"{r['shape']}  {r['tokens']} tokens: {r['whole_us']:.1f} us"),
        )
    if found is None:
        return
    rows = tuple(map(NodesRow.of, found["rows"]))
    doc = Bench(environment=found["environment"], anchors=(), rows=(), summary=(), choice=None, nodes=rows)
    if output is not None:
        _bench_report.write({**plain(doc), **({"rows": plain(rows)} if output.suffix == ".csv" else {})}, output)
        say(f"written: {output}")
    if as_json:
        emit(doc)
    else:
        show(table((*_HEADERS, *_MORE), [_cells(row) for row in rows], left=(0, 3)))
    if not all(row.correct for row in rows):
        say("rows differ from the reference")
        raise click.exceptions.Exit(ExitCode.FAILED)


def _cells(row: NodesRow) -> tuple[str, ...]:
    def figure(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    parts = (row.whole_us, row.kernel_us, row.exchange_us, row.rest_us, row.modelled_us, row.baseline_us)
    return (
        row.shape if row.weights == FP8.name else f"{row.shape} {row.weights}",
        str(row.tokens),
        f"{row.nodes} x {row.ranks_per_node}",
        f"{row.exchange}, {row.partial}",
        str(row.chunks),
        *map(figure, parts),
        figure(row.baseline_speedup, 2),
        f"{row.diff:.1e}" if row.correct else "WRONG",
    )
