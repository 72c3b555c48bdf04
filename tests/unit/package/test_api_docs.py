"""The reference names everything that is public, and docstrings say what goes in, what comes out and what is raised."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable

import pytest

import megamoe_jit as mm
from tests.stubs import REPO

PAGE = (REPO / "docs/api.md").read_text(encoding="utf-8")
PUBLIC = [name for name in mm.__all__ if name != "__version__"]
FUNCTIONS = {name: value for name in PUBLIC if inspect.isfunction(value := getattr(mm, name))}
FORMS = ("fp8_mega_moe_pingpong", "fp8_mega_moe_cooperative")  #: which point at the call that they are a form of
METHODS = {
    f"{owner}.{name}": getattr(getattr(mm, owner), name)
    for owner, names in (
        ("MegaMoE", ("from_checkpoint", "forward", "stage", "load_weights", "check", "destroy")),
        ("SymmBuffer", ("prepare", "prepare_all", "wait_for_last", "check", "destroy")),
        ("MultiNodeBuffer", ("stage", "prepare", "dispatch", "compute", "combine", "check", "destroy")),
    )
    for name in names
}
DESCRIBED = {name: value for name, value in {**FUNCTIONS, **METHODS}.items() if name not in FORMS}
NEVER_RAISE = {"retry", "seal", "sealed", "unseal", "SymmBuffer.wait_for_last"}


def section(described: object, name: str) -> str:
    """The text of a section of a docstring; empty if there is none."""
    found = re.search(rf"^{name}:\n((?:    .*\n|\n)+)", inspect.getdoc(described) + "\n", re.MULTILINE)
    return found[1] if found else ""


def names_in(text: str) -> set[str]:
    return {name for names in re.findall(r"^    (\w+(?:, \w+)*):", text, re.MULTILINE) for name in names.split(", ")}


def test_the_page_names_everything_that_is_public_and_nothing_else():
    assert sorted(re.findall(r"^::: megamoe_jit\.(\w+)$", PAGE, re.MULTILINE)) == sorted([*PUBLIC, "reference"])


def test_the_page_shows_the_methods_that_are_described():
    shown = [f"{owner}.{name}" for owner, names in methods_shown() for name in names if "_acts" not in name]
    assert shown == list(METHODS)


def methods_shown() -> list[tuple[str, list[str]]]:
    found = re.findall(r"^::: megamoe_jit\.(\w+)\n    options:\n      members: \[(.*)\]$", PAGE, re.MULTILINE)
    return [(owner, names.split(", ")) for owner, names in found]


@pytest.mark.parametrize(("name", "function"), DESCRIBED.items())
def test_docstrings_say_what_goes_in_what_comes_out_and_what_is_raised(name: str, function: Callable):
    signature = inspect.signature(function)
    assert names_in(section(function, "Args")) == set(signature.parameters) - {"self"}
    returns = signature.return_annotation not in (None, "None")
    said = section(function, "Returns") or not signature.parameters  # one that takes nothing may say it in its sentence
    assert bool(said) or not returns
    assert bool(section(function, "Raises")) == (name not in NEVER_RAISE)


@pytest.mark.parametrize("name", ["MoEShape", "KernelSpec"])
def test_fields_are_described(name: str):
    value = getattr(mm, name)
    assert names_in(section(value, "Attributes")) == {field.name for field in dataclasses.fields(value)}
    assert section(value, "Raises")


def test_a_layer_and_its_buffer_are_described():
    assert names_in(section(mm.MegaMoE, "Args")) == set(inspect.signature(mm.MegaMoE).parameters)
    assert {"x", "x_sf", "topk_idx", "topk_weights", "ranks"} <= names_in(section(mm.SymmBuffer, "Attributes"))


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_is_raised_is_public(name: str):
    assert names_in(section(DESCRIBED[name], "Raises")) <= set(PUBLIC)
