"""What reports are made of: documents of measurements, tables in Markdown, and where these go in a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def documents_of(kind: str, folder: Path) -> list[dict[str, Any]]:
    """All documents of a kind that are in a folder, the newest last, by the date inside."""
    docs = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json")))
    return sorted((doc for doc in docs if doc.get("kind") == kind), key=lambda doc: str(doc["environment"]["date"]))


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


def conditions(env: Row, *, power: bool = False, ranks: bool = True) -> str:
    """On what was measured, and when, as a sentence.

    Args:
        env: the environment of a document.
        power: say the power limit of the card.
        ranks: say how many there were, if there were several.
    """
    parts = [env["device"]]
    if power:
        parts.append(f"power limit {env.get('power_limit_w', '?')} W")
    parts.append(f"driver {env['driver']}, CUDA {env.get('cuda')}, NVRTC {env['nvrtc']}, torch {env.get('torch')}")
    if "transformers" in env:
        parts.append(f"transformers {env['transformers']}")
    if ranks and env.get("ranks", 1) > 1:
        parts.append(f"{env['ranks']} ranks")
    return ", ".join([*parts, env["date"][:10], f"commit {env['commit']}"]) + "."


def put(text: str, name: str, body: str) -> str:
    """`text` with `body` between the marks of `name`; raises `ValueError` if it has no such marks."""
    begin, end = f"<!-- {name} begin: written by benchmarks/report.py -->", f"<!-- {name} end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the document needs one pair of marks: {begin} and {end}")
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL)
