"""`megamoe-jit bench` over several nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._io import cell, progress_line, show, table
from megamoe_jit._cli._options import named_shapes
from megamoe_jit._spec.formats import FP8
from megamoe_jit._text import counted

if TYPE_CHECKING:
    from megamoe_jit._bench.documents import Bench, NodesRow
    from megamoe_jit._diagnose.between import Ways

_HEADERS = ("SHAPE", "TOKENS", "NODES", "EXCHANGE", "CHUNKS", "WHOLE us", "KERNEL us", "EXCHANGE us", "REST us")
_MORE = ("MODELLED us", "UNFUSED us", "TIMES FASTER", "DIFF")
DEFAULT_TOKENS = (64, 512, 4096)


def refuse_with_nodes(picture: Path | None, variants: Sequence[str]) -> None:
    """Refuse options of `bench` that mean nothing with several nodes."""
    for given, name in ((picture, "--plot"), (variants, "--variant")):
        if given:
            raise click.UsageError(f"{name} is not for --nodes.")


def measured_on_nodes(
    ways: Ways,
    *,
    names: str,
    tokens: Sequence[int] | None,
    ranks: int | None,
    baseline: bool | None,
    weights: str,
) -> Bench | None:
    """The document of `bench` over several nodes; None where torchrun runs another rank that reports.

    Raises:
        ConfigError: a shape is not known.
        UnsupportedDeviceError: there is no GPU.
        MegaMoeError: a rank failed; says what all of them said.
    """
    from megamoe_jit._device.driver import refuse_without_gpu

    presets, counts = named_shapes(names, weights), tokens or DEFAULT_TOKENS
    refuse_without_gpu()
    from megamoe_jit._bench.documents import Bench
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
            progress=lambda r: step(f"{r['shape']}  {counted(r['tokens'], 'token')}: {r['whole_us']:.1f} us"),
        )
    if found is None:
        return None
    alone: dict[str, Any] = {"anchors": (), "rows": (), "summary": (), "choice": None}
    return Bench.of({"environment": found["environment"], **alone, "nodes": found["rows"]})


def print_nodes(rows: Sequence[NodesRow]) -> None:
    """The rows as a table."""
    show(table((*_HEADERS, *_MORE), [_cells(row) for row in rows], left=(0, 3)))


def _cells(row: NodesRow) -> tuple[str, ...]:
    parts = (row.whole_us, row.kernel_us, row.exchange_us, row.rest_us, row.modelled_us, row.baseline_us)
    return (
        row.shape if row.weights == FP8.name else f"{row.shape} {row.weights}",
        str(row.tokens),
        f"{row.nodes} x {row.ranks_per_node}",
        f"{row.exchange}, {row.partial}",
        str(row.chunks),
        *(cell(part, ".1f") for part in parts),
        cell(row.baseline_speedup, ".2f"),
        f"{row.diff:.1e}" if row.correct else "WRONG",
    )
