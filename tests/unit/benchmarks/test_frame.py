"""benchmarks/frame.py, and what floor.py makes of it: arguments, exit codes, rows and the document, without a GPU."""

from __future__ import annotations

import json
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import floor, frame
from megamoe_jit._errors import UnsupportedDeviceError
from tests.unit.bench.test_measure import CONDITIONS, SMALL


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frame, "require_hopper", lambda: torch.device("cpu"))
    monkeypatch.setattr(frame, "environment", lambda commit: {**CONDITIONS, "commit": commit})
    monkeypatch.setattr(frame, "preset", {"small": SMALL}.__getitem__)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def ask(monkeypatch: pytest.MonkeyPatch, *words: str) -> frame.Asked:
    monkeypatch.setattr(sys, "argv", ["program", *words])
    return frame.asked(frame.parser("A program."), ["small"], (7, 3))


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    found = ask(monkeypatch)
    assert (found.presets, found.tokens, found.output, found.ranks) == ([SMALL], [3, 7], None, 1)
    assert found.device == torch.device("cpu")
    found = ask(monkeypatch, "--tokens", "9,1,4", "--output", "x.json")
    assert (found.tokens, found.output) == ([1, 4, 9], Path("x.json"))


def test_nonsense_and_a_missing_gpu_end_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        ask(monkeypatch, "--tokens", "many")
    assert stop.value.code == 2

    def none() -> torch.device:
        raise UnsupportedDeviceError("no Hopper")

    monkeypatch.setattr(frame, "require_hopper", none)
    with pytest.raises(SystemExit) as stop:
        ask(monkeypatch)
    assert stop.value.code == 3
    assert capsys.readouterr().err.endswith("Error: no Hopper\n")


def test_a_shape_is_let_go_of_before_the_next(capsys: pytest.CaptureFixture):
    class Layer:
        pass

    alive: weakref.WeakSet[Layer] = weakref.WeakSet()
    events = []

    @contextmanager
    def make(shape, most):
        assert (shape.experts, most, len(alive)) == (4, 5, 0)
        layer = Layer()
        alive.add(layer)
        yield layer
        events.append("gone")

    def measure(case, layer):
        events.append(case.tokens)
        return {"tokens": case.tokens}

    rows = frame.rows_by_shape([SMALL, SMALL], [2, 5], make, measure, lambda row: f"row {row['tokens']}")
    assert [row["tokens"] for row in rows] == [2, 5, 2, 5]
    assert events == [2, 5, "gone", 2, 5, "gone"]
    assert capsys.readouterr().out == "row 2\nrow 5\nrow 2\nrow 5\n"


def test_the_floor_is_printed_and_written(monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture):
    figures = {"layer_us": 3.0, "weights_us": 2.0, "products_us": 1.0, "of_slower_part": 1.5}
    for name, value in (
        ("anchors", lambda: {"read_4gib_tb_s": 4.2}),
        ("FLUSH_BYTES", 16),
        ("ReadWeights", lambda device: None),
        ("Layer", lambda shape, most, device: SimpleNamespace(close=lambda: None)),
        ("measure", lambda case, *_: {"shape": case.name, "tokens": case.tokens, **figures}),
    ):
        monkeypatch.setattr(floor, name, value)
    output = tmp_path / "floor.json"
    monkeypatch.setattr(sys, "argv", ["floor", "--shapes", "small", "--tokens", "8,1", "--output", str(output)])
    assert floor.main() == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [["small", "1"], ["small", "8"]]
    doc = json.loads(output.read_text())
    assert (doc["kind"], len(doc["anchors"]), doc["environment"]["device"]) == ("floor", 2, "NVIDIA H200")
    assert [row["layer_us"] for row in doc["rows"]] == [3.0, 3.0]
