"""benchmarks/report.py: what the results become in the documents."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.markdown import put


def test_the_tables_are_those_of_the_newest_results(monkeypatch):
    """`python -m benchmarks.report` after a new result, and this passes again."""
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    assert report.main() == 0


def test_without_matplotlib_nothing_is_written(monkeypatch, capsys):
    before = report.DOCUMENT.read_text()
    monkeypatch.setattr(sys, "argv", ["report.py"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert report.main() == 3
    assert "pip install '.[bench]'" in capsys.readouterr().err
    assert report.DOCUMENT.read_text() == before


def test_the_pictures_are_there_and_shown():
    text = report.DOCUMENT.read_text()
    shown = re.findall(r"!\[[^]]*\]\((performance-[^)]+)\)", text)
    newest = report.newest("bench")
    assert {f"performance-{what}-{card}.svg" for what in ("time", "limit") for card in newest} == set(shown)
    for name in shown:
        path = report.DOCS / name
        assert path.is_file()
        card = name.removesuffix(".svg").rpartition("-")[2]
        commit = newest[card]["environment"]["commit"]
        assert commit in path.read_text(), f"{name} is of another result"


def test_newest_is_by_date_and_of_one_rank(tmp_path: Path):
    def write(name: str, device: str, date: str, **more: object) -> None:
        env = {"device": device, "date": date, "file": name, **more}
        (tmp_path / name).write_text(
            json.dumps({"kind": "bench", "environment": env, "rows": [{"best_known_us": 1.0}]})
        )

    write("b.json", "NVIDIA H200", "2026-01-02T00")
    write("a.json", "NVIDIA H200", "2026-01-03T00")
    write("c.json", "NVIDIA H200", "2026-01-04T00", ranks=2)
    write("d.json", "NVIDIA H100 80GB HBM3", "2026-01-01T00")
    (tmp_path / "e.json").write_text("{}")
    found = report.newest("bench", folder=tmp_path)
    assert {card: doc["environment"]["file"] for card, doc in found.items()} == {"h200": "a.json", "h100": "d.json"}
    assert report.newest("bench", 2, tmp_path)["h200"]["environment"]["file"] == "c.json"
    write("f.json", "NVIDIA H20", "2026-01-01T00")
    with pytest.raises(ValueError, match="no card 'NVIDIA H20'"):
        report.newest("bench", folder=tmp_path)


def test_the_floor_names_the_slower_part():
    def row(shape: str, tokens: int, weights: float, products: float) -> dict[str, object]:
        slower = 300.0 / max(weights, products)
        return {
            "shape": shape,
            "tokens": tokens,
            "weights_us": weights,
            "products_us": products,
            "of_slower_part": slower,
        }

    doc = {
        "environment": {"device": "NVIDIA H200"},
        "rows": [row("a", 64, 200, 100), row("a", 8, 150, 10), row("b", 64, 100, 250)],
    }
    assert report.floor_table({"h200": doc}).splitlines() == [
        "| card | layer | 8 | 64 |",
        "| --- | --- | --- | --- |",
        "| H200 | a | 2.00 w | 1.50 w |",
        "| H200 | b | - | 1.20 p |",
    ]


def test_newest_tells_kinds_apart(tmp_path: Path):
    env = {"device": "NVIDIA H200", "date": "2026-01-02T00"}
    for name, kind in (("a.json", "floor"), ("b.json", "bench")):
        doc = {"kind": kind, "environment": env, "rows": [{"best_known_us": 1.0}]}
        (tmp_path / name).write_text(json.dumps(doc))
    for kind in ("floor", "bench"):
        assert report.newest(kind, folder=tmp_path)["h200"]["kind"] == kind


def test_a_body_goes_between_its_marks():
    text = put("a\n<!-- x begin: written by benchmarks/report.py -->\nold\n<!-- x end -->\nb", "x", r"new \1")
    assert text == "a\n<!-- x begin: written by benchmarks/report.py -->\nnew \\1\n<!-- x end -->\nb"
    assert put(text, "x", r"new \1") == text
    with pytest.raises(ValueError, match="one pair of marks"):
        put(text, "y", "")


def test_a_document_without_goals_is_not_the_newest(tmp_path: Path):
    for name, date, best in (("a.json", "2026-01-01T00", 200.0), ("unseen.json", "2026-01-02T00", None)):
        doc = {
            "kind": "bench",
            "environment": {"device": "NVIDIA H200", "date": date},
            "rows": [{"best_known_us": best}],
        }
        (tmp_path / name).write_text(json.dumps(doc))
    assert report.newest("bench", folder=tmp_path)["h200"]["rows"] == [{"best_known_us": 200.0}]
