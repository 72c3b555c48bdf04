"""benchmarks/draws.py: both formats in turns over draws, with the reference and a clock that stand in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import draws
from tests.unit.bench.test_measure import Layer
from tests.unit.benchmarks.environment import measured_here


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Layer:
    package = Layer()
    measured_here(monkeypatch, draws, package)
    return package


@pytest.mark.parametrize(("error", "right"), [(0.0, "yes"), (1.0, "WRONG")])
def test_a_row_for_each_number_of_experts(package, monkeypatch, tmp_path: Path, capsys, error: float, right: str):
    package.error, output = error, tmp_path / "draws.json"
    words = "--shapes", "small", "--tokens", "1,3", "--draws", "6", "--output", str(output)
    monkeypatch.setattr(sys, "argv", ["draws", *words])
    assert draws.main() == int(error > 0)
    head, _, *rows = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert (len(head), {len(row) for row in rows}) == (8, {8})
    one, three = ([row for row in rows if row[1] == tokens] for tokens in ("1", "3"))
    # a token goes to two of four experts, so one token always touches two
    assert [row[2:] for row in one] == [
        [touched, "6", "100.0", "100.0", "1.000", right] for touched in ("2", "mean 2.0")
    ]
    *parts, mean = three
    touched = [int(row[2]) for row in parts]
    assert touched == sorted(set(touched) & {2, 3, 4})
    assert len(touched) > 1
    assert (sum(int(row[3]) for row in parts), mean[3]) == (6, "6")
    doc = json.loads(output.read_text())
    assert (doc["kind"], [row["tokens"] for row in doc["rows"]]) == ("draws", [1, 3])
    assert [draw["seed"] for draw in doc["rows"][1]["draws"]] == [*range(6)]
    assert package.alive == 0
