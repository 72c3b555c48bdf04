"""The rooms of the package: in one order, nothing imports upward, no circle, and `docs/architecture.md` draws them."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import BEFORE, lines_by_room

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "megamoe_jit"
TEXT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
DRAWN = re.findall(r"^ +(_?\w+)/? +\|", TEXT.partition("```text")[2].partition("```")[0], re.MULTILINE)
#: From the ground up: what a room may import stands before it.
ROOMS = list(reversed(DRAWN))
LINES = re.compile(r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", re.MULTILINE)
GROUND, FACADE = "ground", {"__init__", "__main__"}
MOST_AT_THE_TOP = 10


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted names below the package and files, without the two folders that are carried along."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name.split(".")[0] not in {"heuristics", "kernels_src", *FACADE}:
            yield name.removesuffix(".__init__"), path


MODULES = dict(modules())


def room_of(name: str) -> str:
    first = name.split(".")[0]
    return first if first in ROOMS else GROUND


@functools.cache
def imported(name: str) -> set[str]:
    """Modules of the package that a module imports, inside of functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megamoe_jit":
            below = (node.module or "").split(".")[1:]
            for alias in node.names:
                whole = ".".join([*below, alias.name])
                found.add(whole if whole in MODULES else ".".join(below))
        elif isinstance(node, ast.Import):
            found.update(alias.name.removeprefix("megamoe_jit.") for alias in node.names)
    return found & set(MODULES)


def test_the_drawing_shows_every_room():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.is_symlink()} - {"__pycache__"}
    assert set(ROOMS) == folders | {"reference", GROUND}
    assert len(ROOMS) == len(set(ROOMS))
    for room in folders:
        assert f"**`{room}/`**" in TEXT, f"docs/architecture.md has no paragraph on {room}"


def test_few_files_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_AT_THE_TOP


@pytest.mark.parametrize("room", sorted(set(ROOMS) - {"reference", GROUND}))
def test_a_room_says_what_it_owns_and_what_it_must_not_know(room: str):
    said = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert len(said) > 150
    assert re.search(r"\b(must not|nothing heavy)\b", said)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_upward(name: str):
    allowed = set(ROOMS[: ROOMS.index(room_of(name)) + 1])
    upward = {other for other in imported(name) if room_of(other) not in allowed}
    assert not upward, f"{name} is in {room_of(name)}, below {upward}"


def test_what_begins_with_an_underscore_is_its_modules_own():
    """No list says what a module gives; `__all__` stands where names are handed on alone."""
    taken = {
        f"{name} takes {alias.name} of {node.module}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megamoe_jit"
        for alias in node.names
        if alias.name.startswith("_") and alias.name != "__version__"
        if ".".join([*(node.module or "").split(".")[1:], alias.name]) not in MODULES
    }
    assert taken == set()


def test_lines_by_room_are_about_those_that_the_page_tells():
    told = {room: tuple(int(cell.replace(",", "")) for cell in cells) for room, *cells in LINES.findall(TEXT)}
    now, all_of_it = lines_by_room(), told.pop("all")
    assert set(told) == set(now)
    assert {room: then for room, (then, *_) in told.items() if then} == BEFORE
    assert all_of_it == tuple(map(sum, zip(*told.values(), strict=True)))
    for room, (_, same, since) in told.items():
        for said, found in ((same, now[room].whole - now[room].since), (since, now[room].since)):
            assert abs(said - found) <= max(200, said // 5), f"{room}: {said}, but {found}: python -m tests.house"


def test_no_circle():
    reached: dict[str, set[str]] = {name: set(imported(name)) for name in MODULES}
    grown = True
    while grown:
        grown = False
        for direct in reached.values():
            more = set().union(*(reached[other] for other in direct)) - direct if direct else set()
            grown = grown or bool(more)
            direct |= more
    assert sorted(name for name, all_of_it in reached.items() if name in all_of_it) == []


def test_no_more_floors_of_imports_than_the_page_tells():
    @functools.cache
    def floor(name: str) -> int:
        return 1 + max(map(floor, imported(name) - {name}), default=0)

    told = re.search(r"^\| floors of imports between files \| 22 \| (\d+) \|", TEXT, re.MULTILINE)
    assert told is not None
    highest = max(MODULES, key=floor)
    assert floor(highest) <= int(told[1]), f"{highest} stands on {floor(highest)} floors"


def test_each_kernel_has_its_parameters_written_in_one_place():
    """`BoundKernel` those of the layer, `StageKernel` those of staging, `PassKernels` those of passes."""

    def written(node: ast.AST) -> ast.expr | None:
        """What a field is set of, directly or by the field's name."""
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            return node.value
        by_name = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr"
        return node.args[0] if by_name else None

    writers = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (of := written(node)) is not None and "params" in ast.unparse(of)
    }
    assert writers == {"_layer.bound_kernel", "_layer.stage_kernel", "_nodes.pass_kernels"}
