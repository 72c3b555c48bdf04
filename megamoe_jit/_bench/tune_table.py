"""From the tuner's measurements to a table of heuristics."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit.heuristics.tables import FOLDER, SCHEMA_VERSION, parse_table, short_name, tables

CLOSE = 1.01  #: a contender within this factor of the best counts as good as it: fewer borders, none of them from noise

Way = tuple[str, float, int]  #: variant, lag, rows per item


def table_path(device: str, folder: Path = FOLDER) -> Path:
    """Where the table of a GPU belongs: `h200.json` for "NVIDIA H200", `h100.json` for "NVIDIA H100 80GB HBM3"."""
    return folder / f"{short_name(device) or 'gpu'}.json"


def _times(cell: Mapping[str, Any]) -> dict[Way, float]:
    return {(t["variant"], t["lag"], t["rows_per_item"]): t["median_us"] for t in cell["times"] if t["correct"]}


def _best_of(runs: Sequence[Mapping[Way, float]], ways: set[Way]) -> Way:
    """The way that is fastest over some cells, in the geometric mean of its time over the best of each."""
    return min(sorted(ways), key=lambda way: sum(math.log(times[way] / min(times.values())) for times in runs))


def _rules(cells: Sequence[tuple[int, Mapping[Way, float]]]) -> list[dict[str, Any]]:
    """Borders between token counts, from the least that was measured on: one way is kept while it is within 1 % of the
    best."""
    rules: list[dict[str, Any]] = []
    run: list[Mapping[Way, float]] = []
    good: set[Way] = set()
    since = before = cells[0][0]

    def close() -> None:
        variant, lag, rows = _best_of(run, good)
        rules.append({"tokens": since, "variant": variant, "lag": lag, "rows_per_item": rows})

    for tokens, times in cells:
        here = {way for way, time in times.items() if time <= CLOSE * min(times.values())}
        if run and not good & here:
            close()
            run, since = [], math.ceil(math.sqrt(before * tokens))
        good = good & here if run else here
        run.append(times)
        before = tokens
    close()
    return rules


def condense(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table of one GPU.

    Args:
        cells: of `_tune.read`; the last measurement of a shape and token count counts.

    Raises:
        ConfigError: there are none, they are of several GPUs, or no contender of a cell was right.
    """
    last = {(tuple(cell["shape"].values()), cell["tokens"]): cell for cell in cells}
    devices = {cell["environment"]["device"] for cell in last.values()}
    if len(devices) != 1:
        raise ConfigError(f"measurements of {len(devices)} GPUs ({', '.join(sorted(devices))}); allowed: of one")
    wrong = [cell for cell in last.values() if not _times(cell)]
    if wrong:
        raise ConfigError(f"no contender gave the right answer for {wrong[0]['name']}, {wrong[0]['tokens']} tokens")
    newest = max((cell["environment"] for cell in last.values()), key=lambda env: str(env["date"]))
    shapes: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for (sizes, _), cell in sorted(last.items()):
        shapes.setdefault(sizes, []).append(cell)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "heuristics",
        "devices": sorted(devices),
        "measured": newest,
        "shapes": [
            {
                "name": mine[0]["name"],
                **mine[0]["shape"],
                "rules": _rules([(cell["tokens"], _times(cell)) for cell in mine]),
            }
            for mine in shapes.values()
        ],
    }


def write_table(cells: Sequence[Mapping[str, Any]], path: Path | None = None) -> Path:
    """Condense and write; the file of the GPU under `heuristics/tables/` by default.

    Raises:
        ConfigError: see `condense`.
    """
    table = condense(cells)
    parse_table(table)
    path = path or table_path(table["devices"][0])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    tables.cache_clear()
    return path
