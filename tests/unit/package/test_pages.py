"""Pages as they are read: rows stand in tables of as many columns. (`make docs` follows links.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.stubs import REPO

PAGES = [*sorted(REPO.glob("*.md")), *sorted((REPO / "docs").rglob("*.md")), REPO / "benchmarks/README.md"]
RULE = re.compile(r"\|[-: |]+\|")


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def columns(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_row_stands_in_a_table_of_as_many_columns(page: Path):
    """A row behind a paragraph would be read as a part of it."""
    for block in re.findall(r"(?:^\|.*\n?)+", prose(page), re.MULTILINE):
        head, rule, *rows = *block.splitlines(), ""
        assert RULE.fullmatch(rule), f"no table begins with {head[:80]}"
        assert [row[:80] for row in rows if row and columns(row) != columns(rule)] == []
