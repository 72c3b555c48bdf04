"""Tables in Markdown, and where they go in a document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["put", "table"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def put(text: str, name: str, body: str) -> str:
    """`text` with `body` between the marks of `name`; raises `ValueError` if it has no such marks."""
    begin, end = f"<!-- {name} begin: written by benchmarks/report.py -->", f"<!-- {name} end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the document needs one pair of marks: {begin} and {end}")
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL)
