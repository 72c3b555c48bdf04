"""Tables of the layer from bf16 to bf16, for report.py: the documents of from_bf16.py, of one card or several ranks.
Where there are none there is no section either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown import by_layer, conditions, table

Documents = Sequence[Mapping[str, Any]]

#: Rows of the compact table for each layer: what, and its field.
COMPACT = (
    ("kernel alone", "kernel_us"),
    ("layer in a CUDA graph", "layer_graph_us"),
    ("layer, called", "layer_eager_us"),
)
FULL = (
    ("kernel, called", "kernel_us"),
    ("kernel in a graph", "kernel_graph_us"),
    ("layer in a graph", "layer_graph_us"),
    ("layer, called", "layer_eager_us"),
    ("more, µs", "more_us"),
    ("more, %", "more_percent"),
    ("host: layer", "host_layer_us"),
    ("host: kernel", "host_kernel_us"),
    ("host: empty operation", "host_empty_op_us"),
)


def _spread(rows: Sequence[Mapping[str, Any]], field: str) -> str:
    found = sorted(row[field] for row in rows)
    return f"{found[0]:.1f} to {found[-1]:.1f}"


def _host(rows: Sequence[Mapping[str, Any]]) -> str:
    layer, kernel, empty = (_spread(rows, f"host_{what}_us") for what in ("layer", "kernel", "empty_op"))
    return (
        f"Host time of a call: {layer} µs for the layer, {kernel} for the kernel alone, where an operation of torch on "
        f"no elements takes {empty}."
    )


def _said(row: Mapping[str, Any]) -> str:
    return "right" if row["correct"] else "wrong"


def _layer(row: Mapping[str, Any]) -> str:
    """Its name, and the format of its weights where that is not FP8."""
    weights = str(row.get("weights", "fp8"))
    return f"{row['shape']}, {weights.upper()}" if weights != "fp8" else str(row["shape"])


def _once(doc: Mapping[str, Any]) -> str:
    """What was measured once, of one rank alone."""
    if "chain" not in doc:
        return "The layer is what serving engines call, on a buffer of all ranks; figures are of the slowest rank."
    chain, held = doc["chain"], doc["memory"]
    sizes = f"{chain['hidden']} / {chain['intermediate']}, {chain['topk']} of {chain['experts']} experts"
    return (
        f"{chain['layers']} layers of {sizes}, {chain['tokens']} tokens, one after the other: "
        f"{chain['eager_us']:.0f} µs each where they are called, {chain['graph_us']:.0f} as one graph, "
        f"{chain['eager_over_graph']:.2f} times as long. {held['layers']} layers of {held['shape']} that serve "
        f"{held['tokens']} tokens hold {held['beside_gib']:.2f} GiB beside {held['weights_gib']:.1f} GiB of weights."
    )


def compact(docs: Documents) -> str:
    """For the README, of one rank: each layer's kernel, and the layer in a graph and called; tokens side by side."""
    lines: list[str] = []
    for doc in docs:
        if doc["environment"].get("ranks", 1) > 1:
            continue
        tokens, layers = by_layer(doc["rows"], _layer)
        cells = [
            (shape, what, *(f"{rows[count][field]:.0f}" if count in rows else "-" for count in tokens))
            for shape, rows in layers.items()
            for what, field in COMPACT
        ]
        lines += [*table(("layer", "µs of", *map(str, tokens)), cells), "", _host(doc["rows"])]
        lines += [conditions(doc["environment"]), ""]
    return "\n".join(lines[:-1])


def full(docs: Documents) -> str:
    """For docs/performance.md: every row, and what was measured once."""
    lines = ["## From bf16 to bf16", ""]
    for doc in docs:
        rows = doc["rows"]
        head = ("layer", "tokens", *(name for name, _ in FULL), "output")
        cells = [
            (_layer(row), str(row["tokens"]), *(f"{row[field]:.1f}" for _, field in FULL), _said(row)) for row in rows
        ]
        lines += [conditions(doc["environment"]), _host(rows), _once(doc), "", *table(head, cells), ""]
    return "\n".join(lines[:-1])
