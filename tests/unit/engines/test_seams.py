"""What plug-ins rely on, in packages made of the signatures that releases have; and how each kind of move is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamoe_jit.engines.seams import Seam, asked, misfits, problem_of, root_of
from tests.engines.record import RECORDS, SEAMS, write_package

RELEASES = json.loads(RECORDS.read_text(encoding="utf-8"))
NEWEST = {name.rpartition("-")[0]: name for name in sorted(RELEASES)}


def test_every_release_that_a_plug_in_was_run_with_is_recorded():
    assert sorted(RELEASES) == sorted(
        f"{engine}-{version}" for engine, (_, tested) in SEAMS.items() for version in tested
    )


@pytest.mark.parametrize("release", sorted(RELEASES))
def test_a_plug_in_fits_what_a_release_has(release: str, tmp_path: Path):
    seams, _ = SEAMS[release.rpartition("-")[0]]
    assert misfits(seams, write_package(RELEASES[release], tmp_path)) == []


@pytest.mark.parametrize("engine", sorted(SEAMS))
def test_whatever_is_gone_is_named(engine: str, tmp_path: Path):
    seams, _ = SEAMS[engine]
    records = RELEASES[NEWEST[engine]]
    root = write_package(records, tmp_path)
    for module in records:
        file = tmp_path.joinpath(*module.split("."))
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        file.write_text("# nothing\n")
    found = misfits(seams, root)
    assert found == [f"{seam}: is gone" for seam in seams]


@pytest.mark.parametrize(
    ("use", "takes", "text", "said"),
    [
        ("read", "", "def f(): ...", ""),
        ("read", "", "f: int = 3", ""),
        ("read", "", "if True:\n    f = 3", ""),
        ("read", "", "try:\n    import x\nexcept ImportError:\n    f = None", ""),
        ("read", "", "def g(): ...", "is gone"),
        ("called", "a", "f = None", "is no function any more"),
        ("called", "a", "class f: ...", "is no function any more"),
        ("called", "a", "def f(a, b=1, *, c=2): ...", ""),
        ("called", "a", "def f(a, b): ...", "(a, b); they were to be (a)"),
        ("called", "a", "def f(a, *, c): ...", "(a, c)"),
        ("called", "a", "def f(other): ...", "(other)"),
        ("replaced", "a b", "def f(a, b): ...", ""),
        ("replaced", "a b", "def f(a, *, b=1): ...", ""),
        ("replaced", "a b", "def f(a, b, new): ...", "(a, b, new); they were to be (a, b)"),
        ("replaced", "a b", "def f(a, b, new=None): ...", "(a, b, new)"),
        ("replaced", "a b", "def f(b, a): ...", "(b, a)"),
        ("replaced", "a b", "def f(a, b, **more): ...", "to be (a, b)"),
        ("replaced", "a b", "def f(a, b, known=1): ...", ""),
        ("wrapped", "a b", "def f(a, b, new): ...", ""),
        ("wrapped", "a b", "def f(new, a, b): ...", "to begin with (a, b)"),
    ],
)
def test_each_kind_of_move(use, takes, text: str, said: str, tmp_path: Path):
    root = tmp_path / "engine"
    root.mkdir()
    (root / "part.py").write_text(text)
    found = problem_of(Seam("engine.part", "f", use, takes, "known"), root)
    assert (said in found) if said else not found


def test_the_last_definition_counts(tmp_path: Path):
    (tmp_path / "part.py").write_text("def f(a): ...\nif something:\n    def f(a, b): ...\n")
    assert "(a, b)" in problem_of(Seam("engine.part", "f", "replaced", "a"), tmp_path)


def test_a_module_that_is_gone_or_cannot_be_read(tmp_path: Path):
    seam = Seam("engine.part", "f")
    assert problem_of(seam, tmp_path) == "its module is gone"
    (tmp_path / "part.py").write_text("def f(:")
    assert "cannot be read: SyntaxError" in problem_of(seam, tmp_path)
    (tmp_path / "part.py").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in problem_of(Seam("engine.part", "g"), tmp_path)


def test_an_engine_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "some_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert root_of("some_engine") == package
    assert root_of("no_such_engine") is None
    assert list(asked([Seam("some_engine", "f")], "some_engine")) == [("some_engine.f", "is gone")]
    with pytest.raises(ImportError, match="no_such_engine"):
        list(asked([], "no_such_engine"))
