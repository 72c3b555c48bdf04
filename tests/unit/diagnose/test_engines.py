"""`doctor --engine`: what is said of an engine that is not there, is another release, has moved, or fits."""

from __future__ import annotations

import dataclasses

import pytest

from megamoe_jit._diagnose.engines import ENGINES, PAGE, EngineProbe, examine_engine, probe_of
from megamoe_jit._diagnose.finding import Status
from tests.commandline import checked, run, run_with_torch
from tests.stubs import REPO

PIP = "pip"  # a distribution that is installed wherever tests run


def probe(**changes: object) -> EngineProbe:
    fits = EngineProbe("some", PIP, f"{PIP}>=1", (version(),), lambda: [("a.b", "")], ("import some",))
    return dataclasses.replace(fits, **changes)


def version() -> str:
    from importlib.metadata import version as of

    return of(PIP)


def test_an_engine_that_fits():
    found = list(examine_engine(probe()))
    assert [(check.name, check.status) for check in found] == [
        ("some", Status.OK),
        ("hooks", Status.OK),
        ("to type", Status.OK),
    ]
    assert found[-1].detail == "import some"


def test_an_engine_that_is_not_installed_ends_the_questions():
    (only,) = examine_engine(probe(distribution="no-such-engine-anywhere"))
    assert (only.status, only.next_step) == (Status.FAIL, f"pip install '{PIP}>=1'")


def test_a_release_that_nobody_ran_is_a_warning():
    first, *_ = examine_engine(probe(tested=("0.0.1",)))
    assert (first.status, first.data["version"], "0.0.1" in first.detail) == (Status.WARN, version(), True)


def test_a_hook_that_moved_is_named_with_the_release_to_take():
    moved = probe(hooks=lambda: [("a.b", "is gone"), ("c", "")])
    hooks = list(examine_engine(moved))[1]
    assert (hooks.status, hooks.detail) == (Status.FAIL, "a.b: is gone")
    assert "steps aside" in hooks.next_step


def test_an_engine_that_cannot_be_imported_is_a_finding():
    def raises() -> list[tuple[str, str]]:
        raise ImportError("libnothing.so")

    hooks = list(examine_engine(probe(hooks=raises)))[1]
    assert (hooks.status, "ImportError: libnothing.so" in hooks.detail) == (Status.FAIL, True)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_has_a_probe_of_its_name_and_a_release_in_its_range(name: str):
    found = probe_of(name)
    assert found.name == name
    assert found.wanted.startswith(found.distribution)
    assert found.tested
    assert found.typed
    assert (REPO / PAGE).is_file()


def test_the_command_shows_it():
    done = run_with_torch("doctor", "--no-trial", "--engine", "transformers", "--json")
    names = [check["name"] for check in checked(done.stdout)["checks"]]
    assert names[-3:] == ["transformers", "hooks", "to type"]


def test_an_engine_that_there_is_no_plug_in_for_is_wrong_usage():
    done = run("doctor", "--engine", "llama.cpp")
    assert (done.returncode, "transformers" in done.stderr) == (2, True)
