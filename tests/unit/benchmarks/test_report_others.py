"""benchmarks/report_others.py: what layers beside others become in the documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import report_others
from tests.unit.benchmarks.environment import ENV


def row(tokens: int, times: dict[str, float], refused: dict[str, str] | None = None) -> dict[str, Any]:
    diffs = {name: 1e-3 * tokens for name in times}
    return {"shape": "a", "tokens": tokens, "times_us": times, "diffs": diffs, "refused": refused or {}}


def test_tokens_side_by_side_and_the_ratio_to_the_fastest_other_that_was_timed():
    rows = [
        row(8, {"kernel": 40.0, "layer": 50.0, "x": 80.0, "y": 75.0}),
        row(1, {"kernel": 20.0, "layer": 25.0, "x": 30.0}, {"y": "wrong results"}),
    ]
    text = report_others.measured([{"environment": ENV, "rows": rows}])
    assert text.splitlines()[2:] == [
        "| layer | µs of | 1 | 8 | off by |",
        "| --- | --- | --- | --- | --- |",
        "| a | this kernel alone | 20.0 | 40.0 | 8.0e-03 |",
        "| a | this layer | 25.0 | 50.0 | 8.0e-03 |",
        "| a | x | 30.0 | 80.0 | 8.0e-03 |",
        "| a | y | - | 75.0 | 8.0e-03 |",
        "| a | **times as fast as the fastest other** | 1.20 | 1.50 |  |",
        "",
        "Not timed: y: wrong results.",
    ]
    assert "2026-01-02, commit 0123456789ab." in text


def test_with_no_other_there_is_no_ratio():
    text = report_others.measured([{"environment": ENV, "rows": [row(1, {"kernel": 20.0, "layer": 25.0})]}])
    assert "| a | **times as fast as the fastest other** | - |  |" in text


def test_each_published_figure_has_its_card_and_source(tmp_path: Path):
    found = tmp_path / "published.json"
    entry = {"kernel": "k", "gpu": "H20", "layer": "a", "tokens": ["1", "8"], "us": ["5", "9"], "source": "s"}
    found.write_text(json.dumps({"rows": [entry]}), encoding="utf-8")
    assert report_others.published(found).splitlines()[-1] == "| k | H20 | a | 1 / 8 | 5 / 9 | s |"
    for each in json.loads(report_others.PUBLISHED.read_text(encoding="utf-8"))["rows"]:
        assert len(each["tokens"]) == len(each["us"]), "a figure for each token count"
