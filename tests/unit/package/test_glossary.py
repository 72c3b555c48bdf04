"""Each word of the glossary is there once, and lives where it says."""

from __future__ import annotations

import re

import pytest

from tests.stubs import REPO

TEXT = (REPO / "docs/glossary.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (?!---|word |who )(.+?) \| .*?\| (`[^|]+`) \|$", TEXT, re.MULTILINE)


def test_every_row_is_read():
    lines = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(("| word", "| who"))]
    assert len(ROWS) == len(lines) > 60


def test_a_word_has_one_meaning():
    words = [word for first, _ in ROWS for word in first.split(", ")]
    assert sorted(words) == sorted(set(words))


@pytest.mark.parametrize(("word", "place"), ROWS)
def test_it_lives_where_the_last_column_says(word: str, place: str):
    path, name = re.fullmatch(r"`([\w/.]+)` `(\w+)`", place).groups()
    assert re.search(rf"\b{name}\b", (REPO / path).read_text(encoding="utf-8")), f"{word}: no {name} in {path}"
