"""benchmarks/change.py: this checkout and another one in turns, over the reference and a clock that stands in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import change, ranks
from benchmarks.checkout import commit
from megamoe_jit._spec import FP8
from tests.unit.bench.test_measure import Clock, Layer
from tests.unit.benchmarks.environment import measured_here


class Package(Layer):
    """A package whose calls take `factor` times 100 us."""

    def __init__(self, factor: float, error: float = 0.0) -> None:
        super().__init__(error)
        self.factor, self.transformed = factor, 0

    def transform_weights_for_mega_moe_sm90(self, l1, l2):
        self.transformed += 1
        return super().transform_weights_for_mega_moe_sm90(l1, l2)

    def get_symm_buffer_for_mega_moe(self, *sizes):
        made = super().get_symm_buffer_for_mega_moe(*sizes)
        made.check = lambda: None
        return made

    def __getattr__(self, name):
        call = super().__getattr__(name)

        def slower(*arguments, **options):
            begin = Clock.now
            call(*arguments, **options)
            Clock.now = begin + self.factor * 0.1

        return slower


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    now, before = Package(1.0), Package(2.0)
    (tmp_path / "older" / "megamoe_jit").mkdir(parents=True)
    measured_here(monkeypatch, change, now)
    monkeypatch.setattr(change, "import_module", {change.BEFORE: before}.__getitem__)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return now, before


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["change", *words])
    return change.main()


@pytest.mark.parametrize(("error", "said"), [(0.0, "| the same | yes |"), (1.0, "| others | WRONG |")])
def test_the_table_and_the_document(packages, monkeypatch, tmp_path: Path, capsys, error: float, said: str):
    now, before = packages
    now.error, output = error, tmp_path / "change.json"
    words = "--before", str(tmp_path / "older"), "--shapes", "small", "--tokens", "5,3", "--output", str(output)
    assert run(monkeypatch, *words, "--variant", "pingpong") == int(error > 0)
    head, line, *rows = capsys.readouterr().out.splitlines()
    assert (head.count("|"), line) == (9, "| --- | --- | --- | --- | --- | --- | --- | --- |")
    assert rows == [f"| small | {tokens} | pingpong | 200.0 | 100.0 | 0.500 {said}" for tokens in (3, 5)]
    assert (before.transformed, now.alive, before.alive) == (1, 0, 0)
    assert {name for name, _ in before.calls} == {"fp8_mega_moe_pingpong"}
    doc = json.loads(output.read_text())
    assert (doc["kind"], doc["before"], doc["rows"][0]["weights"]) == ("change", "not known", FP8.name)


@pytest.mark.parametrize("main", [change.main, ranks.main])
def test_a_checkout_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys, main):
    monkeypatch.setattr(sys, "argv", ["program", "--before", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "has no folder megamoe_jit; allowed: the root of another checkout" in capsys.readouterr().err


def test_gpus_are_asked_for_before_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ranks, "warm", lambda *_: pytest.fail("compiles"))
    monkeypatch.setattr(sys, "argv", ["ranks", "--ranks", "2"])
    with pytest.raises(SystemExit) as stop:
        ranks.main()
    assert stop.value.code == 3
    assert capsys.readouterr().err == "Error: ranks = 2 needs 2 GPUs; allowed: up to 1 here\n"


def test_the_commit_of_a_folder_that_is_no_checkout(tmp_path: Path):
    assert commit(tmp_path) == "not known"
