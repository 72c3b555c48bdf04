"""A plug-in that does not fit, or fails, is one warning; the engine is not touched and not stopped."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megamoe_jit.engines import aside
from tests.engines.record import RECORDS, write_package
from tests.stubs import REPO

RELEASES = json.loads(RECORDS.read_text(encoding="utf-8"))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENTRIES = {group: entry["megamoe_jit"] for group, entry in PROJECT["entry-points"].items()}
ENGINES = {"sglang": "sglang-0.5.23", "vllm": "vllm-0.33.0", "flashinfer": "flashinfer-0.7.4"}


@pytest.fixture(autouse=True)
def _fresh():
    aside._warned.clear()
    importlib.import_module("megamoe_jit.engines.sglang")._registered = False
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ENGINES]:
        del sys.modules[name]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "megamoe_jit"):
        yield caplog


def register(engine: str) -> None:
    importlib.import_module(f"megamoe_jit.engines.{engine}").register()


def installed(engine: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with an engine's signatures, where Python finds it."""
    root = write_package(RELEASES[ENGINES[engine]], place)
    monkeypatch.syspath_prepend(place)
    return root


def imported(engine: str) -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == engine]


@pytest.mark.parametrize("engine", ENGINES)
class TestAside:
    def test_no_engine(self, engine, warnings):
        for _ in range(3):
            register(engine)
        assert len(warnings.records) == 1
        assert f"there is no package {engine}" in warnings.text

    @pytest.mark.parametrize("change", ["gone", "unreadable", "another parameter"])
    def test_something_moved(self, engine, change, tmp_path, monkeypatch, warnings):
        root = installed(engine, tmp_path, monkeypatch)
        module, names = next((m, n) for m, n in RELEASES[ENGINES[engine]].items() if any(n.values()))
        file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        if change == "gone":
            file.unlink()
        elif change == "unreadable":
            file.write_text("def (")
        else:
            name = next(name for name, parameters in names.items() if parameters)
            (tmp_path / "other").mkdir()
            moved = {module: {**names, name: "self, something, else_"}}
            write_package(moved, tmp_path / "other")
            file.write_text((tmp_path / "other").joinpath(*module.split(".")).with_suffix(".py").read_text())
        for _ in range(2):
            register(engine)
        assert len(warnings.records) == 1
        assert "leaves it as it is" in warnings.text
        assert module in warnings.text
        assert f"doctor --engine {engine}" in warnings.text
        assert imported(engine) == []
        assert root.is_dir()

    def test_an_engine_that_fails_where_it_is_imported(self, engine, tmp_path, monkeypatch, warnings):
        root = installed(engine, tmp_path, monkeypatch)
        (root / "__init__.py").write_text("raise OSError('libcudart.so: no such file')")
        register(engine)
        assert len(warnings.records) == 1
        assert "libcudart.so" in warnings.text

    def test_an_engine_that_takes_no_registration(self, engine, tmp_path, monkeypatch, warnings):
        """Definitions are all as expected, and none of them does anything."""
        installed(engine, tmp_path, monkeypatch)
        register(engine)
        assert len(warnings.records) <= 1


def test_many_reasons_are_cut_short(warnings):
    aside.step_aside("some", [f"reason {i}" for i in range(9)])
    assert "reason 2; and 6 more" in warnings.text
    assert "reason 3" not in warnings.text


@pytest.mark.parametrize("group", sorted(ENTRIES))
def test_entry_points_name_what_is_there(group: str):
    module, _, name = ENTRIES[group].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_entry_points_import_no_engine_and_no_torch():
    """They are imported in every process of an engine, most of which run no model."""
    modules = sorted(entry.partition(":")[0] for entry in ENTRIES.values())
    program = (
        "import sys, importlib\n"
        "before = set(sys.modules)\n"  # a .pth file may have made the namespace package `cuda`
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "heavy = ('torch', 'cuda', 'sglang', 'vllm', 'flashinfer')\n"
        "print([name for name in set(sys.modules) - before if name.split('.')[0] in heavy])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_extras_are_the_releases_that_doctor_names(engine: str):
    seams = importlib.import_module(f"megamoe_jit.engines.{engine}.seams")
    assert PROJECT["optional-dependencies"][engine] == [seams.WANTED]
