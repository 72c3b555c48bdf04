"""The tables of MXFP4 layers beside others, for report.py: what was measured in turns, and what others published."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import by_layer, conditions, table
from megamoe_jit._cli._io import cell

PUBLISHED = Path(__file__).parent / "published_mxfp4.json"
OWN = {"kernel": "this kernel alone", "layer": "this layer"}

Documents = Sequence[Mapping[str, Any]]


def _best_of(row: Mapping[str, Any]) -> float | None:
    """The least time of another."""
    return min((us for name, us in row["times_us"].items() if name not in OWN), default=None)


def _lines(shape: str, rows: Mapping[int, Mapping[str, Any]], counts: Sequence[int]) -> list[tuple[str, ...]]:
    """Of one layer: a line for each that was timed, and how many times as fast this layer is as the fastest other."""
    names = dict.fromkeys((*OWN, *(name for row in rows.values() for name in row["times_us"])))
    lines: list[tuple[str, ...]] = []
    for name in names:
        times: list[float | None] = [rows[count]["times_us"].get(name) if count in rows else None for count in counts]
        diffs = [row["diffs"][name] for row in rows.values() if name in row["times_us"]]
        figures = (cell(us, ".1f") for us in times)
        lines.append((shape, OWN.get(name) or name, *figures, f"{max(diffs):.1e}"))
    ratios: list[float | None] = []
    for count in counts:
        best = _best_of(rows[count]) if count in rows else None
        ratios.append(best / rows[count]["times_us"]["layer"] if best else None)
    return [*lines, (shape, "**times as fast as the fastest other**", *(cell(each, ".2f") for each in ratios), "")]


def measured(docs: Documents) -> str:
    """What took turns in one process; with what was not timed, and why."""
    lines: list[str] = []
    for doc in docs:
        counts, layers = by_layer(doc["rows"], lambda row: str(row["shape"]))
        head = ("layer", "µs of", *map(str, counts), "off by")
        cells = [line for shape, rows in layers.items() for line in _lines(shape, rows, counts)]
        refused = sorted({f"{name}: {why}" for row in doc["rows"] for name, why in row["refused"].items()})
        lines += [conditions(doc["environment"]), "", *table(head, cells)]
        lines += [*(f"\nNot timed: {each}." for each in refused), ""]
    return "\n".join(lines[:-1])


def published(path: Path = PUBLISHED) -> str:
    """What others say of theirs on their machines: another card, all experts on it, another protocol."""
    said = json.loads(path.read_text(encoding="utf-8"))
    cells = [
        (row["kernel"], row["gpu"], row["layer"], " / ".join(row["tokens"]), " / ".join(row["us"]), row["source"])
        for row in said["rows"]
    ]
    return "\n".join(table(("kernel", "GPU", "layer", "tokens", "µs", "source"), cells))
