"""What a choice of the variant costs: its time over that of the best, on every committed row where both were timed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megamoe_jit._bench.tune import read
from megamoe_jit._bench.tune_table import condense, table_path
from megamoe_jit._spec import MoEShape
from megamoe_jit.heuristics import choose
from megamoe_jit.heuristics.tables import FOLDER

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"


@dataclass(frozen=True)
class Cell:
    """Best times in microseconds by variant, of one shape (with the experts of one rank) and token count in one run."""

    device: str
    shape: MoEShape
    tokens: int
    times: dict[str, float]


def benchmarked() -> Iterator[Cell]:
    for path in sorted(RESULTS.rglob("*.json")):
        doc = json.loads(path.read_text(encoding="utf-8"))
        times: dict[tuple[MoEShape, int], dict[str, float]] = {}
        for row in doc["rows"] if doc["kind"] == "bench" else ():
            if row["variant"] != "auto" and row["correct"]:
                shape = MoEShape(row["hidden"], row["intermediate"], row["experts"], row["topk"])
                times.setdefault((shape, row["tokens"]), {})[row["variant"]] = row["median_us"]
        yield from (Cell(doc["environment"]["device"], *where, found) for where, found in times.items())


def tuned() -> Iterator[Cell]:
    for path in sorted(RESULTS.glob("*.jsonl")):
        for cell in read(path):
            times: dict[str, float] = {}
            for time in cell["times"]:
                if time["correct"]:
                    times[time["variant"]] = min(time["median_us"], times.get(time["variant"], time["median_us"]))
            yield Cell(cell["environment"]["device"], MoEShape(**cell["shape"]), cell["tokens"], times)


CELLS = [cell for cell in (*benchmarked(), *tuned()) if len(cell.times) > 1]


def regrets(choice: Callable[[Cell], str]) -> list[float]:
    """Per cell, the share of time that the choice loses against the best."""
    return [cell.times[choice(cell)] / min(cell.times.values()) - 1 for cell in CELLS]


def automatic(cell: Cell) -> str:
    return choose(cell.shape, cell.tokens, gpu=cell.device).variant.value


def by_the_rule(cell: Cell) -> str:
    return choose(cell.shape, cell.tokens).variant.value


@pytest.mark.parametrize("choice", [automatic, by_the_rule])
def test_a_choice_costs_little_where_both_variants_were_timed(choice: Callable[[Cell], str]):
    """Bounds just above what the results give; either variant taken always loses more."""
    found = regrets(choice)
    assert len(found) >= 207
    assert max(found) < 0.011
    assert statistics.fmean(found) < 0.0006
    for always in ("pingpong", "cooperative"):
        assert max(found) < max(regrets(lambda _, name=always: name)) / 2
        assert statistics.fmean(found) < statistics.fmean(regrets(lambda _, name=always: name)) / 2


@pytest.mark.parametrize("threshold", [64, 512, 1024])
def test_no_other_threshold_is_better(threshold: int):
    other = regrets(lambda cell: choose(cell.shape, cell.tokens, cooperative_threshold=threshold).variant.value)
    own = regrets(by_the_rule)
    assert (max(own), statistics.fmean(own)) < (max(other), statistics.fmean(other))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*-tuning.jsonl")), ids=lambda path: path.stem)
def test_the_shipped_table_is_that_of_the_committed_measurements(path: Path):
    made = condense(read(path))
    assert json.loads(table_path(made["devices"][0], FOLDER).read_text(encoding="utf-8")) == made
