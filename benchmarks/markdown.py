"""Tables in Markdown, what is said under them, and where they go in a document."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def by_layer(rows: Iterable[Row], name: Callable[[Row], str]) -> tuple[list[int], dict[str, dict[int, Row]]]:
    """For tables with token counts side by side: all counts, ascending, and each layer's rows by count."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(name(row), {})[row["tokens"]] = row
    return sorted({count for each in found.values() for count in each}), found


def conditions(doc: Row) -> str:
    """On what a document was measured, and when."""
    env = doc["environment"]
    ranks = [f"{env['ranks']} ranks"] if env.get("ranks", 1) > 1 else []
    stack = f"driver {env['driver']}, CUDA {env.get('cuda')}, NVRTC {env['nvrtc']}, torch {env.get('torch')}"
    return ", ".join([env["device"], stack, *ranks, env["date"][:10], f"commit {env['commit']}"]) + "."


def put(text: str, name: str, body: str) -> str:
    """`text` with `body` between the marks of `name`; raises `ValueError` if it has no such marks."""
    begin, end = f"<!-- {name} begin: written by benchmarks/report.py -->", f"<!-- {name} end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the document needs one pair of marks: {begin} and {end}")
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL)
