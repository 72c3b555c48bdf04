"""`docs/architecture.md` names every module, in an order in which they import each other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "megamoe_jit"
ROW = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \|", re.MULTILINE)
TABLE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("| module |")[2]
PLACE = {name: number for number, row in enumerate(ROW.findall(TABLE)) for name in re.findall(r"\w+", row)}
#: Named in the other table, or not worth a row.
ELSEWHERE = {"__init__", "__main__", "_version", "_scenarios"}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, inside of functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "megamoe_jit":
            below = node.module.split(".")[1:]
            found.update(below[:1] or [alias.name for alias in node.names])
    return found


def test_every_module_has_a_row():
    assert set(PLACE) == {path.stem for path in PACKAGE.glob("*.py")} - ELSEWHERE


@pytest.mark.parametrize("name", PLACE)
def test_nothing_is_imported_from_a_row_below(name: str):
    above = {other for other, place in PLACE.items() if place <= PLACE[name]}
    assert imported(PACKAGE / f"{name}.py") & set(PLACE) <= above
    assert "_cli" not in imported(PACKAGE / f"{name}.py")
